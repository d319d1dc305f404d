"""How the CPU's threads wait for one another. Import this before torch: OpenMP reads the settings when it is loaded.

By default a thread that has nothing to do spins, so a step becomes several times slower as soon as another program
wants one of the cores; `OMP_WAIT_POLICY=PASSIVE` alone sends it to sleep at once, and waking it takes longer than many
of the short operations of a training step. A thousand spins before it sleeps are a compromise: on two cores, a step of
a small network ran at 1.1 to 1.4 times the speed of sleeping at once, two runs side by side at 0.9 times. Ten times as
many spins cut the speed of two runs to a third, a hundred times as many to less than a tenth.

Settings in the environment have precedence.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
