const HEADER = {{ facts_json }};
const $ = id => document.getElementById(id);
const percent = p => p > .999 && p < 1 ? '> 99.9 %' : p >= .1 ? `${(100*p).toFixed(p > .995 ? 1 : 0)} %` : `${(100*p).toFixed(1)} %`;
const inWords = p => HEADER.words.find(([least]) => p >= least)[1];
let shown = null, turn = 0, stream = null;

function fail(why) {
  $('error').textContent = why; $('error').hidden = !why;
  if (why) { $('state').textContent = ''; $('answer').hidden = true; }
}

async function picture(file) {
  try { return await createImageBitmap(file, {imageOrientation: 'from-image', colorSpaceConversion: 'none', premultiplyAlpha: 'none'}); }
  catch { return null; }
}

async function classify(file) {
  const mine = ++turn;
  fail('');
  $('state').textContent = 'Looking at the picture …';
  try {
    const im = await picture(file), found = await ask(file, im);
    if (mine !== turn) return;
    shown = {...found, im};
    show();
  } catch (e) { if (mine === turn) fail(e.message || String(e)); }
}

function show() {
  const [top] = shown.classes, words = inWords(top.probability);
  $('said').replaceChildren(words[0].toUpperCase() + words.slice(1) + ': ', Object.assign(document.createElement('b'), {textContent: top.name}),
                            ` (${percent(top.probability)})`);
  $('trust').textContent = HEADER.calibrated ? `Calibrated on validation images: of 100 answers as sure as this one, about ${Math.min(99, Math.round(100*top.probability))} are right, for pictures such as it was trained on.`
    : 'Not calibrated: how often answers as sure as this one are right was never measured.';
  $('classes').replaceChildren(...shown.classes.map(c => {
    const row = document.createElement('tr'), th = Object.assign(document.createElement('th'), {scope: 'row', textContent: c.name});
    const bar = Object.assign(document.createElement('td'), {className: 'bar'}), fill = document.createElement('span');
    fill.style.width = `${100*c.probability}%`; bar.setAttribute('aria-hidden', 'true'); bar.append(fill);
    row.append(th, bar, Object.assign(document.createElement('td'), {className: 'n', textContent: percent(c.probability)}));
    return row;
  }));
  $('ranked').textContent = `The ${shown.classes.length} most probable of ${HEADER.classes} classes`;
  $('took').textContent = `${shown.ms < 10 ? shown.ms.toFixed(1) : Math.round(shown.ms)} ms`;
  $('state').textContent = '';
  $('answer').hidden = false;
  scales();
  draw(0);
  // read out at once, and where the keyboard goes on from
  $('answer-title').textContent = `Answer: ${words}, ${top.name}, ${percent(top.probability)}`;
  $('answer-title').focus({preventScroll: true});
  if (matchMedia('(max-width: 760px)').matches) $('answer').scrollIntoView({block: 'start'});
}

function scales() {
  const maps = shown.maps || [];
  $('scales').hidden = !maps.length || !shown.im;
  for (const o of $('scales').querySelectorAll('label')) o.remove();
  if ($('scales').hidden) return;
  ['Picture', ...maps.map((m, i) => `Scale ${i+1} of ${maps.length}`)].forEach((name, i) => {
    const label = document.createElement('label'), radio = Object.assign(document.createElement('input'), {type: 'radio', name: 'scale', value: i, checked: !i});
    radio.addEventListener('change', () => draw(i));
    label.append(radio, name);
    $('scales').append(label);
  });
}

// red and blue of equal lightness steps, readable by the colour-blind
const RED = [178, 24, 43], BLUE = [33, 102, 172];
function draw(which) {
  const canvas = $('view'), im = shown.im;
  canvas.hidden = !im;
  $('told').textContent = im ? '' : 'This browser cannot show the picture; the answer is for it all the same.';
  if (!im) return;
  const k = Math.min(1, 900/Math.max(im.width, im.height)), ctx = canvas.getContext('2d');
  canvas.width = Math.max(1, Math.round(k*im.width)); canvas.height = Math.max(1, Math.round(k*im.height));
  ctx.fillStyle = '#fff'; ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.drawImage(im, 0, 0, canvas.width, canvas.height);
  const top = shown.classes[0].name;
  canvas.setAttribute('aria-label', which ? `The picture in grey under the map of scale ${which} of ${shown.maps.length} for ${top}` : `The picture, named ${top}`);
  if (!which) return;
  // per area, so that the scales compare, and one range of colours for all
  const dense = m => m.rows.flat().map(v => v*m.rows.length*m.rows[0].length);
  const most = Math.max(...shown.maps.map(m => Math.max(...dense(m).map(Math.abs)))) || 1;
  const total = m => m.rows.flat().reduce((a, b) => a+b, 0), sum = shown.maps.reduce((a, m) => a + Math.abs(total(m)), 0) || 1;
  const m = shown.maps[which-1], h = m.rows.length, w = m.rows[0].length;
  const data = ctx.getImageData(0, 0, canvas.width, canvas.height), p = data.data;
  const seen = dense(m);
  for (let y = 0, i = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++, i += 4) {
    const v = seen[Math.floor(y*h/canvas.height)*w + Math.floor(x*w/canvas.width)]/most, a = Math.min(1, Math.abs(v)), c = v > 0 ? RED : BLUE;
    const grey = 153 + .4*(p[i]+p[i+1]+p[i+2])/3;
    for (let j = 0; j < 3; j++) p[i+j] = .45*grey + .55*(247 + (c[j]-247)*a);
  }
  ctx.putImageData(data, 0, 0);
  const t = total(m), key = cls => Object.assign(document.createElement('span'), {className: `key ${cls}`});
  $('told').replaceChildren(`Stride ${m.stride}: ${t < 0 ? '−' : '+'}${Math.abs(t).toFixed(2)} to the score of ${top}, ${Math.round(100*Math.abs(t)/sum)} % of what the scales give. `,
                            key('for'), ' speaks for it, ', key('against'), ' against it.');
}

function take(list) {
  const file = [...list].find(f => f.type.startsWith('image/')) || list[0];
  if (file) classify(file);
}
for (const id of ['file', 'phone']) $(id).addEventListener('change', e => { take(e.target.files); e.target.value = ''; });
addEventListener('paste', e => {
  const files = [...e.clipboardData.items].filter(o => o.kind === 'file').map(o => o.getAsFile());
  if (files.length) take(files); else if (!(e.target instanceof HTMLInputElement)) fail('There is no picture in the clipboard.');
});
addEventListener('dragover', e => { e.preventDefault(); $('drop').classList.add('over'); });
addEventListener('dragleave', e => { if (!e.relatedTarget) $('drop').classList.remove('over'); });
addEventListener('drop', e => { e.preventDefault(); $('drop').classList.remove('over'); take(e.dataTransfer.files); });

function closeCamera() { stream?.getTracks().forEach(t => t.stop()); stream = null; $('camera').hidden = true; }
$('photo').addEventListener('click', async () => {
  if (!navigator.mediaDevices?.getUserMedia || matchMedia('(pointer: coarse)').matches) return $('phone').click();
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
    const video = document.querySelector('video');
    video.srcObject = stream; $('snap').disabled = true; $('camera').hidden = false;
    await video.play(); // before it there is no picture to take
    $('snap').disabled = false; $('snap').focus();
  } catch (e) { closeCamera(); fail(`There is no camera to use: ${e.message}`); }
});
$('close').addEventListener('click', () => { closeCamera(); $('photo').focus(); });
$('snap').addEventListener('click', () => {
  const video = document.querySelector('video'), c = document.createElement('canvas');
  c.width = video.videoWidth; c.height = video.videoHeight;
  c.getContext('2d').drawImage(video, 0, 0);
  closeCamera();
  c.toBlob(classify, 'image/png');
});
{{ ask }}
