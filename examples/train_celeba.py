"""Train a SAGAN on faces, or on any images, with classes or without.

    python examples/train_celeba.py                                    # procedural faces, nothing to download
    python examples/train_celeba.py --data ~/img_align_celeba.zip      # or a folder of images, at any depth
    python examples/train_celeba.py --data ~/animals --classes own --architecture resnet      # a class per subfolder
    python examples/train_celeba.py @examples/recipes/celeba64.txt --data ~/img_align_celeba.zip     # tried settings
    python examples/train_celeba.py --resume auto                      # continue where that run stopped, or begin
    python examples/train_celeba.py --dry-run                          # a few steps, to see that everything works
    torchrun --nproc-per-node 8 examples/train_celeba.py --data ~/img_align_celeba.zip --batch-size 512 --precision bf16

The folder `--out` receives sample grids, attention maps, `log.jsonl`, TensorBoard's files and checkpoints. A run
that was stopped (by Ctrl-C, SIGTERM, or the power) and resumed continues as if it had never stopped: on the CPU,
bitwise.

The training step is in training/step.py, the meaning of each setting in training/flags.py.
"""

from __future__ import annotations

import training.threads  # noqa: F401  before torch  # isort: skip

import math
import shlex
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM
from typing import Any

import torch
from torch import nn

from evaluation.evaluator import Sampler, listed
from evaluation.evaluator import open_evaluator as open_scores
from evaluation.sliced_wasserstein import COARSEST
from torch_sagan import spectral_norms
from training.data.dataset import Batch, changes
from training.data.image_folder import ImageFolder, left_out
from training.data.loading import read_batches
from training.data.sources import DataSource, InfiniteBatchSampler, crop_setting, folder_of, open_data, open_held_out
from training.data.workers import usable_cores
from training.flags import Config, check, default_out
from training.latents import draw_labels
from training.output.estimate import LongRun
from training.output.logging import RunLog, one_report
from training.output.model_card import image_channels
from training.output.sampling import draw, redraw, save_reals, usable_average
from training.runs.atomic_files import write_json
from training.runs.checkpointing import archive_previous_run, load, newest, save, save_and_rotate, versions
from training.runs.distributed import Ranks, ShardSampler, pick_device, processes
from training.runs.folder import shared_cache
from training.runs.memory import out_of_memory
from training.runs.run_lock import RunLock
from training.runs.signals import StopRequested, deferred_signals, stop_requested
from training.runs.tensor_files import refuse_unsafe_torch
from training.script import fail, interpreter, read_arguments, resolve_config, script
from training.state import TrainingState

Evaluate = Callable[[nn.Module, int], dict[str, float]]  # a generator and a seed -> scores; the first one selects
LOST = 1000  # among the numbers of signals: a process has no more images
OpenEvaluator = Callable[[Config, DataSource, torch.device, Path | None], Evaluate | None]


def read_images(
    data: DataSource, config: Config, position: int, device: torch.device, ranks: Ranks
) -> Generator[Batch]:
    """This process's pieces of batches, starting at the image `position` of the run's endless order.

    The order is that of all processes together, so a run can be resumed with more or fewer processes.
    """
    order = InfiniteBatchSampler(len(data), config.batch_size, seed=config.seed, flip=data.flip, position=position)
    # From memory or the cache a batch is one copy; to transfer it from a worker would take four times as long.
    workers = min(config.num_workers, usable_cores()) if isinstance(data, ImageFolder) else 0
    shards = ShardSampler(order, ranks, config.grad_accum_steps)
    return read_batches(data, shards, workers=workers, pin_memory=device.type == "cuda")


# ----------------------------------------------------------------------------------------------------- evaluation


def open_evaluator(config: Config, data: DataSource, device: torch.device, cache: Path | None) -> Evaluate | None:
    """FID if Inception is available, else the distance in features of a classifier for images with classes, else the
    sliced Wasserstein distance come first. Smaller is better."""
    if config.image_size < COARSEST:
        print(f"evaluate  no: it needs images of {COARSEST} pixels or more")
        return None
    if len(data) < 4:
        print(f"evaluate  no: it needs four images or more, there are {len(data)}")
        return None
    held_out = open_held_out(
        config.data, size=config.image_size, classes=config.classes, channels=config.channels, mirror=config.mirror
    )
    evaluator = open_scores(
        data,
        held_out,
        samples=config.eval_samples,
        cache=cache,
        device=device,
        inception=Path(config.inception) if config.inception else None,
        against_training=config.eval_against == "training",
    )
    when = f"every {config.eval_every} steps" if config.eval_every <= config.steps else "at the end"
    about = f"{evaluator.samples} images of each kind, {when}, against {evaluator.against}"
    print(f"evaluate  {about}; {evaluator.note}".rstrip("; "))
    if evaluator.classifier:
        print(f"classifier {evaluator.classifier.about}")
    classes = data.labels.counts() if data.labels else {}

    def draw_inputs(count: int, rng: torch.Generator) -> Sequence[torch.Tensor]:
        z = torch.randn(count, config.z_dim, generator=rng)
        return (z, draw_labels(count, list(classes.values()), rng)) if classes else (z,)

    inputs: Sampler = draw_inputs
    return lambda generator, seed: evaluator(generator, inputs, seed=seed)


def evaluate_average(state: TrainingState, evaluate: Evaluate) -> bool:
    """Score the averaged generator. Returns whether it is the best so far."""
    state.scores = evaluate(usable_average(state), state.config.seed)
    name, score = next(iter(state.scores.items()))
    # On a machine without Inception another score selects; it is compared only with scores of the same name.
    best = score < state.best.get(name, math.inf)
    state.best[name] = min(score, state.best.get(name, math.inf))
    return best


def sigmas(state: TrainingState) -> dict[str, dict[str, float]]:
    """The exact largest singular value of every normalized weight."""
    if state.device.type == "mps":  # it has no float64
        return {}
    return {"sigma_G": spectral_norms(state.generator), "sigma_D": spectral_norms(state.discriminator)}


# ------------------------------------------------------------------------------------------------------- training


@one_report()
def train(state: TrainingState, data: DataSource, out: Path, evaluate: Evaluate | None = None) -> int:
    """Train until the last step or a signal. Returns that signal's number, or 0."""
    config, ranks = state.config, state.ranks
    with ranks.agreeing():
        log = RunLog(out, state.step, config.steps, config.batch_size, config.tensorboard) if ranks.first else None
    state.means.restart()
    images = read_images(data, config, state.images, state.device, ranks)
    saved = None
    with (
        closing(log) if log else nullcontext(),
        deferred_signals(second_stops=ranks.world == 1),
        closing(images),
        ranks.noticing_losses(),  # while signals are deferred
    ):
        batches, pace = state.batches(images), LongRun(state.device, state.step, config.steps, config.batch_size)
        while state.step < config.steps:
            drawn = lost = None
            try:
                drawn = None if stop_requested() else state.draw(batches)
            except StopRequested:
                pass
            except OSError as error:  # no more images: what was learned so far is saved
                lost = error
            # All processes stop at the same step, before any of them begins the next one.
            signal = ranks.all_reduce_max(LOST if lost else stop_requested() or SIGTERM * ranks.abandoned)
            if signal or drawn is None:
                break
            state.means.add(state.advance(iter(drawn)))
            if log:
                log.advance()
                pace.advance(state.step)
            step, end = state.step, state.step == config.steps
            logs, draws, saves = (step % n == 0 for n in (config.log_every, config.sample_every, config.save_every))
            # A run that is too short for an evaluation is evaluated at its end.
            evaluates = config.eval_every > 0 and step % min(config.eval_every, config.steps) == 0
            if not (end or logs or draws or saves or evaluates):
                continue
            with ranks.agreeing():
                state.classes = data.counts()  # without the images that turned out to be unreadable
                best = report(state, log, evaluate if evaluates else None)
                if end or saves or evaluates:
                    checkpoint = state.state_dict()
                    if best:
                        save(checkpoint, out / "best.pt")
                    if log and (end or saves):
                        save_and_rotate(checkpoint, out, keep_last=config.keep_last, keep_every=config.keep_every)
            saved = step if end or saves else saved
            if draws and not end:
                with ranks.agreeing():
                    if log:
                        log.images(step, draw(state, out))
                        log.scalars(step, sigmas(state) if log.tensorboard else {})
            state.means.restart()
        else:
            return 0
        if saved != state.step:
            with ranks.agreeing():
                if state.means.steps:  # since the last line of the log: the checkpoint keeps their losses for the next
                    state.means.check(state.step)
                checkpoint = state.state_dict()
                if log:
                    save_and_rotate(checkpoint, out, keep_last=config.keep_last, keep_every=config.keep_every)
        if signal == LOST:
            with ranks.agreeing():  # of which the first says why
                if lost:
                    fail(f"step {state.step + 1}: {lost}")
        return signal


def report(state: TrainingState, log: RunLog | None, evaluate: Evaluate | None) -> bool:
    """Write a line of the log, after an evaluation if one is due. Returns whether its score is the best so far."""
    line = {"images": state.images} | state.means.read(state.step, state.config.batch_size) | state.numbers()
    if log is None:
        return False
    best = evaluate_average(state, evaluate) if evaluate else False
    log.write(state.step, line | ({"scores": state.scores} if evaluate else {}))
    return best


# ----------------------------------------------------------------------------------------------- start, and resume


def main(arguments: Sequence[str] | None = None, open_evaluator: OpenEvaluator = open_evaluator) -> int:
    refuse_unsafe_torch()  # or the run could not be resumed
    with processes() as ranks:
        with ranks.agreeing():
            args = read_arguments(Config, arguments, "Train a SAGAN on faces, digits or your own images.")
        # A function, so that its networks are freed before the process group ends.
        return start(args, ranks, open_evaluator)


def start(args: dict[str, Any], ranks: Ranks, open_evaluator: OpenEvaluator) -> int:
    """Run what the command line asks for. Returns the exit status."""
    resume, dry_run = args.pop("resume"), args.pop("dry_run")
    folder = ranks.broadcast(folder_to_resume(resume, args))
    out = Path(args.get("out") or folder or default_out(args.get("data", Config.data)))
    args["out"] = str(out)
    if dry_run:  # in another folder, since its settings are not those of the run
        out = out / "dry-run"
    with closing(RunLock(out)) as lock:
        with ranks.agreeing():
            if ranks.first and lock.path.exists():  # a run's folder: lock it before looking for the newest checkpoint
                lock.acquire()
            checkpoint = find(resume, folder) if folder and ranks.first else None
        checkpoint = ranks.broadcast(checkpoint)
        first = checkpoint["step"] if checkpoint else 0
        with ranks.agreeing(ValueError):
            config = configure(args, checkpoint, ranks, dry_run=dry_run, out=out)
            if first >= config.steps and resume != "auto":
                fail(f"--steps {config.steps}: the checkpoint is at step {first} already")
            cache = Path(config.cache_dir or shared_cache(Path(args["out"]))) if config.cache else None
            device = pick_device(config.device, ranks)
            if config.cuda_graph and device.type != "cuda":
                fail(f"--cuda-graph: expected a CUDA device, got {device}")
        same = checkpoint is not None and folder is not None and folder.resolve() == out.resolve()
        if first >= config.steps:
            with ranks.agreeing(ValueError):
                if same and ranks.first and checkpoint:
                    redraw(restore(config, checkpoint, device, Ranks(), resume), out)
            print(f"complete  {config.out} is at step {first} (--steps {config.steps}); a larger --steps trains on")
            return 0
        for verify in (True, False):  # one process of each machine verifies or builds a cache, then the others map it
            with ranks.agreeing(ValueError):
                if verify == (ranks.local_rank == 0):
                    data = open_data(
                        config.data,
                        size=config.image_size,
                        crop=crop_setting(config.crop),
                        cache=cache,
                        verify=verify,
                        classes=config.classes,
                        attributes=config.attributes,
                        channels=config.channels,
                        mirror=config.mirror,
                    )
        with ranks.agreeing(ValueError):
            state = begin(config, data, checkpoint, device, ranks, resume)
        with ranks.agreeing(ValueError):
            if ranks.first:
                out.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                if same:
                    redraw(state, out)
                if earlier := archive_previous_run(out, asdict(config), after=first if same else None):
                    print(f"moved     the files of an earlier run to {earlier}")
                write_json(out / "config.json", asdict(config))
                save_reals(data, config.seed, out / "reals.png")
                announce(state, data, out / "reals.png", checkpoint)
        evaluate = None
        with ranks.agreeing(ValueError):
            if ranks.first and config.eval_every > 0:
                evaluate = open_evaluator(config, data, device, cache)
        stopped = train_or_say_why_not(state, data, out, evaluate)
        with ranks.agreeing():
            if ranks.first:
                finish(state, out, stopped=stopped, dry_run=dry_run)
        return 128 + stopped if stopped else 0


def configure(
    args: dict[str, Any], checkpoint: dict[str, Any] | None, ranks: Ranks, *, dry_run: bool, out: Path
) -> Config:
    """The settings of the run that the command line asks for."""
    config = resolve_config(Config, args, checkpoint and checkpoint["config"])
    check(config, ranks.world)
    if dry_run:
        first = checkpoint["step"] if checkpoint else 0
        config = replace(config, steps=first + 3, log_every=1, sample_every=2, save_every=2, out=str(out))
        config = replace(config, eval_every=min(config.eval_every, 2), eval_samples=64)
    return config


def folder_to_resume(resume: str | None, args: dict[str, Any]) -> Path | None:
    """The folder of the run to resume."""
    if resume is None:
        return None
    if resume == "auto":
        return Path(args.get("out") or default_out(args.get("data", Config.data)))
    return Path(resume) if Path(resume).is_dir() else Path(resume).parent


def find(resume: str, folder: Path) -> dict[str, Any] | None:
    """The checkpoint to resume from."""
    if resume == "auto":
        return newest(folder) if folder.is_dir() else None
    return load(Path(resume))


def begin(
    config: Config,
    data: DataSource,
    checkpoint: dict[str, Any] | None,
    device: torch.device,
    ranks: Ranks,
    resume: str | None,
) -> TrainingState:
    """The state of a new run on this data, or of the run in the checkpoint."""
    classes = data.counts()
    channels = data[[(0, False)]].images.shape[1]
    if checkpoint is None:
        state = TrainingState(config, image_channels=channels, classes=classes, device=device, ranks=ranks)
        state.data = data.fingerprint()
        return state
    if list(checkpoint["classes"]) != list(classes):
        before, now = (", ".join(names) or "none" for names in (checkpoint["classes"], classes))
        fail(f"--resume {resume}: its networks have other classes ({before}) than --data {config.data} ({now})")
    state = restore(config, checkpoint, device, ranks, resume)
    if channels != (built := image_channels(checkpoint["generator"])):
        fail(f"--resume {resume}: its networks have image_channels={built}, but the images of --data have {channels}")
    state.classes, state.data = classes, data.fingerprint()  # of the images as they are now
    return state


def restore(
    config: Config, checkpoint: dict[str, Any], device: torch.device, ranks: Ranks, resume: str | None
) -> TrainingState:
    """The state of the run in a checkpoint."""
    try:
        channels, classes = image_channels(checkpoint["generator"]), checkpoint["classes"]
        state = TrainingState(config, image_channels=channels, classes=classes, device=device, ranks=ranks)
        state.load_state_dict(checkpoint)
    except KeyError as missing:
        fail(f"--resume {resume}: the checkpoint lacks {missing}")
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        fail(f"--resume {resume}: its weights do not fit the networks of its settings")
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        fail(f"--resume {resume}: the checkpoint was edited or damaged: {error}")
    return state


def train_or_say_why_not(state: TrainingState, data: DataSource, out: Path, evaluate: Evaluate | None) -> int:
    """`train`, with one line as the error if memory or disk space runs out."""
    try:
        return train(state, data, out, evaluate)
    except torch._dynamo.exc.TorchDynamoException as error:
        fail(f"--compile: {str(error).splitlines()[0]}")
    except OSError as error:
        fail(f"step {state.step + 1}: {error}")
    except (RuntimeError, MemoryError) as error:
        if short := out_of_memory(error):
            fail(f"step {state.step + 1}: {short} Less --batch-size or more --grad-accum-steps needs less")
        raise


def announce(state: TrainingState, data: DataSource, reals: Path, checkpoint: dict[str, Any] | None) -> None:
    """Print what the run will do."""
    config = state.config
    folder = folder_of(data)
    for line in left_out(data.others) if isinstance(data, ImageFolder) else ():  # the builder of a cache names them
        print(line, file=sys.stderr)
    if checkpoint and (other := {n: v for n, v in checkpoint["versions"].items() if v != versions().get(n)}):
        print(f"versions  the checkpoint was made with {', '.join(f'{name} {v}' for name, v in other.items())}")
    readable, of_the_class = len(data) - data.missing, " of the same class" if data.labels else ""
    print(f"data      {config.data}: {readable} images at {config.image_size} px; the first are in {reals}")
    if data.missing:
        print(f"          {data.missing} more cannot be read; another image{of_the_class} takes the place of each")
    if checkpoint and (changed := changes(checkpoint.get("data") or state.data, state.data)):
        print(f"          since the checkpoint the data have changed: {changed}")
    if folder:
        print(f"crop      {folder.crops()}")
        if folder.skipped:
            print(f"not read  {folder.skipped}")
        if config.channels == "auto" and folder.gray():
            print("channels  3, though these images are gray; a new run with --channels 1 would train on one")
    if state.classes:
        shown = [f"{name} {count}" for name, count in list(state.classes.items())[:12]]
        print(f"classes   {len(state.classes)}: {', '.join(shown)}{', …' if len(state.classes) > 12 else ''}")
    weights = [sum(p.numel() for p in network.parameters()) for network in (state.generator, state.discriminator)]
    speed = [config.precision, *(["compiled"] if config.compile else [])]
    if config.compile and config.has_penalty:
        speed[-1] = "G compiled, D not (a compiled graph has no double backward)"
    speed += ["in a CUDA graph"] if config.cuda_graph else []
    networks = f"{config.architecture}, G {weights[0]:,} and D {weights[1]:,} weights"
    print(f"networks  {networks}, on {state.device}")
    print(f"loss      {config.loss}" + (", D without spectral norm" if config.loss == "wgan-gp" else ""))
    print(f"training  steps {state.step} to {config.steps}, batches of {config.batch_size}, {', '.join(speed)}")
    if state.ranks.world > 1:
        print(f"processes {state.ranks.world}, each with {config.batch_size // state.ranks.world} images of a batch")
    sys.stdout.flush()


def finish(state: TrainingState, out: Path, *, stopped: int, dry_run: bool) -> None:
    """Draw the last images, and print where the results are."""
    # A scheduler may send another signal, but everything is saved, and only the images are missing.
    with deferred_signals(second_stops=state.ranks.world == 1):
        made = draw(state, out)
    made |= {"checkpoint": out / f"checkpoint-{state.step:06d}.pt", "log": out / "log.jsonl"}
    if (out / "best.pt").exists():
        made["best"] = out / "best.pt"
    if stopped:
        print(f"stopped at step {state.step}")
    if dry_run:
        print(f"dry run    all that it wrote is in {out}")
    for what, file in made.items():
        print(f"{what:11}{file}")
    if state.scores:
        print(f"{'scores':11}{listed(state.scores)}")
    if dry_run:
        return
    if stopped:
        print(f"next       the same command with --resume {shlex.quote(str(out))}")
    else:
        python, run = shlex.quote(interpreter()), shlex.quote(str(out))
        print(f"next       {python} examples/generate.py {run} --grid    (--help: walks, videos, scores, export)")
        print(f"           {python} examples/show_attention.py {run}")
        print(f"           {python} examples/report.py {run}")


if __name__ == "__main__":
    script(main)
