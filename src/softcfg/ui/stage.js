// Choosing a token of a finished picture, by pointer or keys. Runs once with the stage's `element`; Gradio gives
// `trigger` (an event to the server) and `watch` (a call after the stage has changed).
let chosen = null; // {picture, token}
let timer = null;

// A picture's places are counted along its rows; tokens in front of the rows have places below 0.
class Places {
  constructor(picture) {
    for (const name of ["picture", "front", "rows", "columns", "stride"]) this[name] = Number(picture.dataset[name]);
    this.count = this.rows * this.columns;
  }
  token(place) {
    if (place < 0) return place + this.front;
    return this.front + Math.floor(place / this.columns) * this.stride + (place % this.columns);
  }
  of(token) {
    if (token < this.front) return token - this.front;
    const column = Math.min((token - this.front) % this.stride, this.columns - 1);
    return Math.floor((token - this.front) / this.stride) * this.columns + column;
  }
}

const finished = () => [...element.querySelectorAll(".picture[data-picture]")];

function mark() {
  const pictures = finished();
  if (chosen && !pictures.some((picture) => Number(picture.dataset.picture) === chosen.picture)) chosen = null;
  for (const picture of pictures) {
    const places = new Places(picture);
    const cursor = picture.querySelector(".cursor");
    picture.classList.toggle("chosen", chosen !== null && chosen.picture === places.picture);
    for (const cell of picture.querySelectorAll("[data-token]"))
      cell.classList.toggle("marked", chosen !== null && Number(cell.dataset.token) === chosen.token);
    const place = chosen ? places.of(chosen.token) : -1;
    cursor.hidden = place < 0;
    picture.setAttribute("aria-valuenow", chosen ? String(chosen.token) : "0");
    if (place < 0) {
      picture.setAttribute("aria-valuetext", chosen ? `token ${chosen.token}` : "no token chosen");
      continue;
    }
    const row = Math.floor(place / places.columns);
    const column = place % places.columns;
    picture.setAttribute("aria-valuetext", `token ${chosen.token}, row ${row + 1}, column ${column + 1}`);
    cursor.style.left = `${(100 * column) / places.columns}%`;
    cursor.style.top = `${(100 * row) / places.rows}%`;
    cursor.style.width = `${100 / places.columns}%`;
    cursor.style.height = `${100 / places.rows}%`;
  }
}

function choose(places, place) {
  chosen = { picture: places.picture, token: places.token(place) };
  mark();
  // A held key moves the cursor at once and asks the server when it rests.
  clearTimeout(timer);
  timer = setTimeout(() => trigger("choose", chosen), 90);
}

element.addEventListener("click", (event) => {
  const picture = event.target.closest(".picture[data-picture]");
  if (!picture) return;
  const places = new Places(picture);
  const cell = event.target.closest("[data-token]");
  if (cell) return choose(places, places.of(Number(cell.dataset.token)));
  const box = picture.querySelector(".canvas").getBoundingClientRect();
  const along = (part, count) => Math.max(0, Math.min(count - 1, Math.floor(part * count)));
  const row = along((event.clientY - box.top) / box.height, places.rows);
  choose(places, row * places.columns + along((event.clientX - box.left) / box.width, places.columns));
});

element.addEventListener("keydown", (event) => {
  const picture = event.target.closest(".picture[data-picture]");
  if (!picture || event.ctrlKey || event.altKey || event.metaKey) return;
  const places = new Places(picture);
  const { columns, rows, front, count } = places;
  const middle = Math.floor(rows / 2) * columns + Math.floor(columns / 2);
  const place = chosen ? places.of(chosen.token) : middle;
  const moves = {
    ArrowLeft: place - 1, ArrowRight: place + 1, ArrowUp: place - columns, ArrowDown: place + columns,
    PageUp: place - 4 * columns, PageDown: place + 4 * columns, Home: -front, End: count - 1, Enter: place, " ": place,
  };
  if (!(event.key in moves)) return;
  event.preventDefault();
  // The first key on a picture chooses the token that is marked; the next ones move on from there.
  const target = chosen && chosen.picture === places.picture ? moves[event.key] : place;
  if (target >= -front && target < count) choose(places, target);
});

// On a narrow screen the pictures are below the form: go there when a drawing begins.
let drawing = false;
function follow() {
  const before = drawing;
  drawing = element.querySelector(".unfinished") !== null;
  if (before || !drawing || innerWidth > 900) return;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
}

watch("value", () => {
  mark();
  follow();
});
mark();
