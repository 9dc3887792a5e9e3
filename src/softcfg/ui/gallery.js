// Showing the drawing of a picture of the gallery again.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-open]");
  if (button) trigger("open", { picture: Number(button.dataset.open) });
});
