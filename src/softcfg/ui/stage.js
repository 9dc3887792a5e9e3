// Choosing a token of a finished picture, by pointer or keys. Runs once with the stage's `element`; Gradio gives
// `trigger` (an event to the server) and `watch` (a call after the stage has changed).
let chosen = null; // {picture, token}
let timer = null;

const finished = () => [...element.querySelectorAll(".picture[data-picture]")];
const numbers = (picture) => ({
  number: Number(picture.dataset.picture),
  front: Number(picture.dataset.front),
  rows: Number(picture.dataset.rows),
  columns: Number(picture.dataset.columns),
});

function mark() {
  const pictures = finished();
  if (chosen && !pictures.some((picture) => numbers(picture).number === chosen.picture)) chosen = null;
  for (const picture of pictures) {
    const { number, front, rows, columns } = numbers(picture);
    const cursor = picture.querySelector(".cursor");
    const token = chosen ? chosen.token : null;
    picture.classList.toggle("chosen", chosen !== null && chosen.picture === number);
    for (const cell of picture.querySelectorAll(".front span"))
      cell.classList.toggle("chosen", Number(cell.dataset.token) === token);
    cursor.hidden = token === null || token < front;
    if (token === null) {
      picture.setAttribute("aria-valuenow", "0");
      picture.setAttribute("aria-valuetext", "no token chosen");
      continue;
    }
    const row = Math.floor((token - front) / columns);
    const column = (token - front) % columns;
    picture.setAttribute("aria-valuenow", String(token));
    picture.setAttribute(
      "aria-valuetext",
      token < front ? `token ${token}` : `token ${token}, row ${row + 1}, column ${column + 1}`,
    );
    cursor.style.left = `${(100 * column) / columns}%`;
    cursor.style.top = `${(100 * row) / rows}%`;
    cursor.style.width = `${100 / columns}%`;
    cursor.style.height = `${100 / rows}%`;
  }
}

function choose(picture, token) {
  const { number, front, rows, columns } = numbers(picture);
  const last = front + rows * columns - 1;
  chosen = { picture: number, token: Math.max(0, Math.min(last, token)) };
  mark();
  // A held key moves the cursor at once and asks the server when it rests.
  clearTimeout(timer);
  timer = setTimeout(() => trigger("choose", chosen), 90);
}

element.addEventListener("click", (event) => {
  const picture = event.target.closest(".picture[data-picture]");
  if (!picture) return;
  const { front, rows, columns } = numbers(picture);
  const cell = event.target.closest("[data-token]");
  if (cell) return choose(picture, Number(cell.dataset.token));
  const box = picture.querySelector(".canvas").getBoundingClientRect();
  const column = Math.min(columns - 1, Math.floor((columns * (event.clientX - box.left)) / box.width));
  const row = Math.min(rows - 1, Math.floor((rows * (event.clientY - box.top)) / box.height));
  choose(picture, front + Math.max(0, row) * columns + Math.max(0, column));
});

element.addEventListener("keydown", (event) => {
  const picture = event.target.closest(".picture[data-picture]");
  if (!picture || event.ctrlKey || event.altKey || event.metaKey) return;
  const { number, front, rows, columns } = numbers(picture);
  const total = front + rows * columns;
  const middle = front + Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const token = chosen ? chosen.token : middle;
  // The first key on a picture chooses the token that is marked; the next ones move on from there.
  const begin = !chosen || chosen.picture !== number;
  const moves = {
    ArrowLeft: token - 1, ArrowRight: token + 1, ArrowUp: token - columns, ArrowDown: token + columns,
    PageUp: token - 4 * columns, PageDown: token + 4 * columns, Home: 0, End: total - 1, Enter: token, " ": token,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  const target = begin ? token : moves[event.key];
  if (target >= 0 && target < total) choose(picture, target);
});

watch("value", mark);
mark();
