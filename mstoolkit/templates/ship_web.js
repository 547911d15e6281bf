// What the browser decodes, over white.
function decoded(im) {
  const c = document.createElement('canvas');
  c.width = im.width; c.height = im.height;
  const ctx = c.getContext('2d', {willReadFrequently: true});
  ctx.fillStyle = '#fff'; ctx.fillRect(0, 0, c.width, c.height); ctx.drawImage(im, 0, 0);
  const rgba = ctx.getImageData(0, 0, c.width, c.height).data, data = new Uint8Array(3*c.width*c.height);
  for (let i = 0, j = 0; i < rgba.length; i += 4, j += 3) { data[j] = rgba[i]; data[j+1] = rgba[i+1]; data[j+2] = rgba[i+2]; }
  return {h: c.height, w: c.width, data};
}
const halfEven = v => { const f = Math.floor(v), d = v - f; return d > .5 || d === .5 && f % 2 ? f+1 : f; };

// The average of whole blocks, and the linear interpolation in 11 bits, as OpenCV computes them: the same numbers.
function blocks({h, w, data}, ky, kx) {
  const H = Math.floor(h/ky), W = Math.floor(w/kx), out = new Uint8Array(3*H*W), inv = Math.fround(1/(ky*kx));
  for (let y = 0; y < H; y++) for (let x = 0; x < W; x++) for (let c = 0; c < 3; c++) {
    let s = 0;
    for (let i = 0; i < ky; i++) for (let j = 0, at = 3*((y*ky+i)*w + x*kx) + c; j < kx; j++, at += 3) s += data[at];
    out[3*(y*W+x) + c] = ky === 2 && kx === 2 ? (s+2) >> 2 : Math.min(255, halfEven(Math.fround(s*inv)));
  }
  return {h: H, w: W, data: out};
}
function places(n, N, edge) {
  return Array.from({length: n}, (_, o) => {
    const at = Math.fround((o+.5)*(N/n) - .5);
    let i = Math.floor(at), f = Math.fround(at - i);
    if (edge && (i < 0 || i >= N-1)) f = 0;
    return [Math.min(N-1, Math.max(0, i)), Math.min(N-1, Math.max(0, i+1)), halfEven(Math.fround((1-f)*2048)), halfEven(Math.fround(f*2048))];
  });
}
function linear({h, w, data}, H, W) {
  const out = new Uint8Array(3*H*W), xs = places(W, w, true), ys = places(H, h, false);
  const row = y => { const r = new Int32Array(3*W); xs.forEach(([i, j, a, b], x) => { for (let c = 0; c < 3; c++) r[3*x+c] = data[3*(y*w+i)+c]*a + data[3*(y*w+j)+c]*b; }); return r; };
  const kept = new Map(), at = y => { if (!kept.has(y)) { if (kept.size > 4) kept.delete(kept.keys().next().value); kept.set(y, row(y)); } return kept.get(y); };
  ys.forEach(([i, j, a, b], y) => {
    const p = at(i), q = at(j);
    for (let x = 0; x < 3*W; x++) out[3*W*y + x] = (((a*(p[x] >> 4)) >> 16) + ((b*(q[x] >> 4)) >> 16) + 2) >> 2;
  });
  return {h: H, w: W, data: out};
}
// What a JPEG says of itself: how it is turned (EXIF), and whether its chroma has half its resolution; null for what is none.
async function jpegHeader(file) {
  const v = new DataView(await file.arrayBuffer()), told = {turn: 1, halved: false};
  try {
    if (v.getUint16(0) !== 0xffd8) return null;
    for (let at = 2; v.getUint8(at) === 0xff && v.getUint8(at+1) !== 0xda; at += 2 + v.getUint16(at+2)) {
      const kind = v.getUint8(at+1);
      if (kind >= 0xc0 && kind <= 0xc2) told.halved = v.getUint8(at+9) === 3 && v.getUint8(at+11) === 0x22 && v.getUint8(at+14) === 0x11 && v.getUint8(at+17) === 0x11;
      if (kind !== 0xe1 || v.getUint32(at+4) !== 0x45786966) continue;
      const tiff = at+10, little = v.getUint16(tiff) === 0x4949, ifd = tiff + v.getUint32(tiff+4, little);
      for (let e = ifd+2, n = v.getUint16(ifd, little); n; n--, e += 12) if (v.getUint16(e, little) === 0x112) told.turn = v.getUint16(e+8, little);
    }
  } catch { } // the file ends before that
  return told;
}
// Averages of k × k blocks that begin at the file's own first pixel, wherever that was turned to, and repeat the last pixels at the far edges.
function means({h, w, data}, channels, k, turn) {
  const H = Math.ceil(h/k), W = Math.ceil(w/k), out = new Float32Array(channels*H*W);
  const from = (n, N, back) => Int32Array.from({length: N*k}, (_, i) => back ? Math.max(0, n - N*k + i) : Math.min(n-1, i));
  const xs = from(w, W, [2, 3, 6, 7].includes(turn)).map(x => channels*x), ys = from(h, H, [3, 4, 7, 8].includes(turn)).map(y => channels*w*y);
  for (let y = 0, o = 0; y < H; y++) for (let x = 0; x < W; x++) for (let c = 0; c < channels; c++, o++) {
    let s = 0;
    for (let i = 0; i < k; i++) for (let j = 0, row = ys[y*k+i] + c; j < k; j++) s += data[row + xs[x*k+j]];
    out[o] = s/(k*k);
  }
  return {h: H, w: W, data: out};
}
// Browsers enlarge halved chroma by a triangle filter, so that the average of two pixels is (1 6 1)/8 of the file's own samples. Solved for these, in place.
function sharpened(data, n, step, lines, jump) {
  const c = new Float64Array(n), d = new Float64Array(n);
  for (let l = 0; l < lines; l++) for (const first of [l*jump, l*jump + 1]) {
    for (let i = 0, at = first; i < n; i++, at += step) {
      c[i] = 1/(6 + (i === 0) + (i === n-1) - (i && c[i-1]));
      d[i] = (8*data[at] - (i && d[i-1]))*c[i];
    }
    for (let i = n-1, at = first + i*step, last = 0; i >= 0; i--, at -= step) data[at] = last = d[i] - (i < n-1 ? c[i]*last : 0);
  }
}
// Python decodes a large JPEG at 1/8, 1/4 or 1/2, which in libjpeg are averages of its luma and chroma. Browsers decode it whole; the averages are taken here.
function reduced(im, size, jpeg) {
  const k = jpeg && [8, 4, 2].find(k => Math.min(im.h, im.w) >= k*size);
  if (!k) return im;
  const chroma = ({h, w, data}) => {
    const out = new Float32Array(2*h*w);
    for (let i = 0, o = 0; o < out.length; i += 3) {
      const r = data[i], g = data[i+1], b = data[i+2];
      out[o++] = .5*b - .168735892*r - .331264108*g; out[o++] = .5*r - .418687589*g - .081312411*b;
    }
    return {h, w, data: out};
  };
  const {h, w, data} = means(im, 3, k, jpeg.turn);
  let uv;
  if (jpeg.halved) {
    uv = chroma(k === 2 ? {h, w, data} : means(im, 3, 2, jpeg.turn));
    sharpened(uv.data, uv.w, 2, uv.h, 2*uv.w); sharpened(uv.data, uv.h, 2*uv.w, uv.w, 2);
    uv = k === 2 ? uv : means(uv, 2, k/2, jpeg.turn);
  } else uv = chroma({h, w, data});
  const out = new Uint8ClampedArray(3*h*w);
  for (let i = 0, j = 0; i < out.length; i += 3, j += 2) {
    const l = Math.round(.299*data[i] + .587*data[i+1] + .114*data[i+2]), u = Math.round(uv.data[j]), v = Math.round(uv.data[j+1]);
    out[i] = l + ((91881*v + 32768) >> 16);
    out[i+1] = l + ((32768 - 22554*u - 46802*v) >> 16);
    out[i+2] = l + ((116130*u + 32768) >> 16);
  }
  return {h, w, data: new Uint8Array(out.buffer)};
}
function resized(im, size) {
  let ky = Math.max(1, Math.floor(im.h/size)), kx = Math.max(1, Math.floor(im.w/size));
  if (Math.max(ky, kx) < 3*Math.min(ky, kx)) ky = kx = Math.min(ky, kx);
  if (ky > 1 || kx > 1) im = blocks(im, ky, kx);
  return im.h === size && im.w === size ? im : linear(im, size, size);
}

let opened = null;
async function open() {
  const ort = await import('./runtime/ort.wasm.min.mjs');
  ort.env.wasm.wasmPaths = new URL('./runtime/', location.href).href;
  ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
  return {ort, session: await ort.InferenceSession.create(HEADER.model)};
}
async function ask(file, im) {
  if (!im) throw new Error('This browser cannot read the file as an image.');
  opened ??= open();
  let it;
  try { it = await opened; }
  catch (e) { opened = null; throw new Error(`The model cannot be loaded: ${e.message}`); }
  const start = performance.now(), whole = decoded(im), jpeg = await jpegHeader(file), feeds = {};
  HEADER.sizes.forEach((s, i) => { feeds[it.session.inputNames[i]] = new it.ort.Tensor('uint8', resized(reduced(whole, s, jpeg), s).data, [1, s, s, 3]); });
  const out = await it.session.run(feeds), p = [...out.probabilities.data];
  const ranked = p.map((v, i) => ({name: HEADER.names[i], probability: v})).sort((a, b) => b.probability - a.probability).slice(0, 5);
  const maps = HEADER.strides.map((stride, i) => {
    const {data, dims: [, h, w]} = out[`map_${i+1}`];
    return {stride, rows: Array.from({length: h}, (_, y) => [...data.slice(y*w, y*w+w)])};
  });
  return {classes: ranked, maps, ms: performance.now() - start, all: p};
}
// for other programs on this page, and for tests: the probabilities of a file, in the order of the classes, and its pixels as the network takes them
window.mstoolkit = {
  header: HEADER, resized, probabilities: async file => (await ask(file, await picture(file))).all,
  pixels: async (file, size) => resized(reduced(decoded(await picture(file)), size, await jpegHeader(file)), size).data};
opened = open(); // while the picture is being chosen
opened.catch(() => { opened = null; });
