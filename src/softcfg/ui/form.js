// Drawing an example, and Enter in a field of the form. Runs once with the examples' `element`.
const form = document.getElementById("form");

element.addEventListener("click", (event) => {
  const chip = event.target.closest("[data-example]");
  if (chip) trigger("pick", { example: Number(chip.dataset.example) });
});

// Gradio shows the keys of the choices as tooltips.
form.addEventListener("pointerover", (event) => {
  if (event.target.matches("#methods input")) event.target.removeAttribute("title");
});

// Ahead of Gradio, for which Enter in the prompt breaks the line and Shift+Enter submits.
form.addEventListener(
  "keydown",
  (event) => {
    if (event.key !== "Enter" || event.isComposing || !event.target.matches("textarea, input[type=number]")) return;
    event.stopPropagation();
    if (event.shiftKey) return;
    event.preventDefault();
    setTimeout(() => document.getElementById("draw").click()); // after Gradio has taken the field's value
  },
  true,
);
