// The theme that the reader has chosen, also in the frames of explorers.
{
  const frames = document.querySelectorAll("iframe.explorer");
  const tell = () => frames.forEach(({ contentWindow }) =>
    contentWindow.postMessage({ theme: document.body.dataset.theme }, "*"));
  new MutationObserver(tell).observe(document.body, { attributeFilter: ["data-theme"] });
  frames.forEach((frame) => frame.addEventListener("load", tell));
  tell();
}
