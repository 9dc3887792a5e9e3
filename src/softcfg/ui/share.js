// Copying the settings link.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-copy]");
  if (button) copy(button);
});

async function copy(button) {
  const text = new URL(button.dataset.copy, document.baseURI).href;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without the right to the clipboard the address is shown, to be copied by hand.
    window.prompt("Settings link", text);
  }
  setTimeout(() => (button.textContent = "Copy link"), 1500);
}
