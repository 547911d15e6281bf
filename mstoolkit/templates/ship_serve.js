async function ask(file) {
  const token = $('token')?.value.trim(), headers = token ? {Authorization: `Bearer ${token}`} : {};
  let r;
  try { r = await fetch('predict?maps=1&top=5', {method: 'POST', body: file, headers: {...headers, 'Content-Type': 'application/octet-stream'}}); }
  catch { throw new Error('The server does not answer.'); }
  const said = await r.json().catch(() => ({}));
  if (!r.ok) throw new Error(r.status === 401 ? 'The server asks for its access token.' : said.error || `The server answered ${r.status}.`);
  return {...said.predictions[0], ms: said.ms};
}
