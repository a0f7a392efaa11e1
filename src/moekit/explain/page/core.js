"use strict";
// Files of figures, and what every figure shares. No file is fetched: all is made from the report in the page.
const report = JSON.parse(document.getElementById("report").textContent);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--mk-" + name).trim();
const safe = (text) =>
  String(text).replace(/[&<>"']/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" })[sign]);
const known = (value) => typeof value === "number";
const say = (value, digits = 3) => (known(value) ? value.toFixed(digits).replace("-", "−") : "–");
const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)}%` : "–");

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const fileName = (title, ending) => `${(report.title || "moekit")} ${title}`.replace(/[^\p{L}\p{N}]+/gu, "-") + "." + ending;

function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    // a spreadsheet would run a text that begins like a formula
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return new Blob(["\ufeff" + rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n"], { type: "text/csv" });
}

// A PDF file of one page, as large as the picture at 96 pixels an inch, which it holds as a JPEG (ISO 32000-1, 7.5 and 8.9).
function pdf(canvas, ratio, title) {
  const jpeg = Uint8Array.from(atob(canvas.toDataURL("image/jpeg", 0.95).split(",")[1]), (sign) => sign.charCodeAt(0));
  const width = (canvas.width / ratio) * 0.75, height = (canvas.height / ratio) * 0.75;
  const drawn = `q ${width} 0 0 ${height} 0 0 cm /Im0 Do Q`;
  const name = [..."\ufeff" + title].flatMap((sign) => sign.split("")).map((unit) => unit.charCodeAt(0).toString(16).padStart(4, "0"));
  const objects = [
    ["<< /Type /Catalog /Pages 2 0 R >>"],
    ["<< /Type /Pages /Kids [3 0 R] /Count 1 >>"],
    [`<< /Type /Page /Parent 2 0 R /MediaBox [0 0 ${width} ${height}] /Resources << /XObject << /Im0 4 0 R >> >> /Contents 5 0 R >>`],
    [`<< /Type /XObject /Subtype /Image /Width ${canvas.width} /Height ${canvas.height} /ColorSpace /DeviceRGB ` +
      `/BitsPerComponent 8 /Filter /DCTDecode /Length ${jpeg.length} >>\nstream\n`, jpeg, "\nendstream"],
    [`<< /Length ${drawn.length} >>\nstream\n${drawn}\nendstream`],
    [`<< /Title <${name.join("")}> /Producer (moekit) >>`],
  ];
  const encode = new TextEncoder(), parts = [], places = [];
  let length = 0;
  const put = (part) => {
    const bytes = typeof part === "string" ? encode.encode(part) : part;
    parts.push(bytes);
    length += bytes.length;
  };
  put("%PDF-1.4\n");
  objects.forEach((object, index) => {
    places.push(length);
    [`${index + 1} 0 obj\n`, ...object, "\nendobj\n"].forEach(put);
  });
  const table = length;
  put(`xref\n0 ${objects.length + 1}\n0000000000 65535 f \n`);
  places.forEach((place) => put(`${String(place).padStart(10, "0")} 00000 n \n`));
  put(`trailer\n<< /Size ${objects.length + 1} /Root 1 0 R /Info 6 0 R >>\nstartxref\n${table}\n%%EOF\n`);
  return new Blob(parts, { type: "application/pdf" });
}

// The picture of a figure with its heading above and where it comes from below.
function framed(picture, ratio, title) {
  const canvas = document.createElement("canvas"), room = 34 * ratio;
  canvas.width = picture.width;
  canvas.height = picture.height + 2 * room;
  const pen = canvas.getContext("2d"), family = getComputedStyle(document.body).fontFamily;
  pen.fillStyle = colour("surface");
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, room);
  pen.fillStyle = colour("ink");
  pen.font = `600 ${16 * ratio}px ${family}`;
  pen.fillText(title, 8 * ratio, 22 * ratio, canvas.width - 16 * ratio);
  pen.fillStyle = colour("muted");
  pen.font = `${12 * ratio}px ${family}`;
  const from = `${report.title || report.source} · moekit ${report.moekit_version}`;
  pen.fillText(from, 8 * ratio, canvas.height - 12 * ratio, canvas.width - 16 * ratio);
  return canvas;
}

const RATIO = 2;
function saveButtons(place, title, picture, rows) {
  const offer = (label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-label", `${label}: ${title()}`);
    button.addEventListener("click", act);
    place.append(button);
  };
  if (picture) {
    offer("PNG", () => framed(picture(RATIO), RATIO, title()).toBlob((blob) => save(fileName(title(), "png"), blob)));
    offer("PDF", () => save(fileName(title(), "pdf"), pdf(framed(picture(RATIO), RATIO, title()), RATIO, title())));
  }
  offer("CSV", () => save(fileName(title(), "csv"), csv(rows())));
}

function choice(place, label, items, changed) {
  const box = document.createElement("label"), select = document.createElement("select");
  items.forEach(([value, text]) => select.append(new Option(text, value)));
  select.addEventListener("change", changed);
  box.append(label + " ", select);
  if (items.length > 1) place.insertBefore(box, place.querySelector(".save"));
  return select;
}

// A click on a heading sorts by its column, a second one the other way round; what is missing stays last.
function sortable(table) {
  const value = (row, column) => {
    const cell = row.cells[column], said = cell.dataset.value ?? cell.textContent;
    const number = Number.parseFloat(said);
    return said === "" || said === "–" ? null : Number.isNaN(number) ? said : number;
  };
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => {
        const a = value(one, column), b = value(other, column);
        if (a === null || b === null) return (a === null) - (b === null);
        if (typeof a === "number" && typeof b === "number") return down * (a - b);
        return down * String(a).localeCompare(String(b));
      });
      table.tBodies[0].append(...rows);
    });
  });
}

const tableRows = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent.trim()));
