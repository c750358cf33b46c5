// Files for the person: one as it is, several as one zip archive (stored, not compressed; PKWARE APPNOTE 6.3).

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let value = n;
  for (let k = 0; k < 8; k++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});

function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = TABLE[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

function record(signature, ...fields) {
  const view = new DataView(new ArrayBuffer(4 + fields.reduce((sum, [size]) => sum + size, 0)));
  view.setUint32(0, signature, true);
  let at = 4;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

/** Return a zip archive of {name: text} as a Blob. */
export function zip(files, { date = new Date() } = {}) {
  const encoder = new TextEncoder();
  const time = (date.getHours() << 11) | (date.getMinutes() << 5) | (date.getSeconds() >> 1);
  const day = (Math.max(0, date.getFullYear() - 1980) << 9) | ((date.getMonth() + 1) << 5) | date.getDate();
  const [content, directory] = [[], []];
  let [offset, size] = [0, 0];
  for (const [name, text] of Object.entries(files)) {
    const [title, bytes] = [encoder.encode(name), encoder.encode(text)];
    // version 2.0, names in UTF-8, stored, time, day, checksum, size twice, length of the name, no extra field
    const shared = [[2, 20], [2, 0x0800], [2, 0], [2, time], [2, day], [4, crc32(bytes)], [4, bytes.length], [4, bytes.length], [2, title.length], [2, 0]];
    const local = record(0x04034b50, ...shared);
    const entry = record(0x02014b50, [2, 20], ...shared, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]);
    content.push(local, title, bytes);
    directory.push(entry, title);
    offset += local.length + title.length + bytes.length;
    size += entry.length + title.length;
  }
  const n = Object.keys(files).length;
  const end = record(0x06054b50, [2, 0], [2, 0], [2, n], [2, n], [4, size], [4, offset], [2, 0]);
  return new Blob([...content, ...directory, end], { type: "application/zip" });
}

/** Hand a file to the person. */
export function download(name, content, type = "text/plain") {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
