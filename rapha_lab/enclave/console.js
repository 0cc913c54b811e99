'use strict';
// Everything shown is put in as text, never as markup: sources and answers are foreign.
const at = id => document.getElementById(id);
let token = '', policy = '', shown = null, login = null, held = null, looks = 0;

async function ask(what, body) {
  const headers = { 'Content-Type': 'application/json', ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const reply = await fetch(`/console/${what}`, { method: 'POST', headers, body: JSON.stringify(body ?? {}) });
  const told = await reply.json();
  if (!reply.ok) { throw new Error([told.what, told.why, told.instead].filter(Boolean).join(' ')); }
  return told;
}

function on(id, act) {
  at(id).addEventListener('click', async () => {
    at('problem').hidden = true;
    try { await act(); } catch (error) { at('problem').textContent = error.message; at('problem').hidden = false; }
  });
}

function save(name, content) {
  const link = document.createElement('a');
  const blob = content instanceof ArrayBuffer ? [content] : [JSON.stringify(content)];
  link.href = URL.createObjectURL(new Blob(blob, { type: content instanceof ArrayBuffer ? 'application/octet-stream' : 'application/json' }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function element(kind, text, parent, name) {
  const made = document.createElement(kind);
  made.textContent = text;
  if (name) { made.className = name; }
  parent.append(made);
  return made;
}

function only(id) { for (const part of ['login', 'list', 'item']) { at(part).hidden = part !== id; } }

async function list() {
  const all = await ask('items');
  at('items').replaceChildren(); at('decided').replaceChildren();
  for (const told of all) {
    const waits = told.state === 'waiting';
    const row = element('li', '', at(waits ? 'items' : 'decided'));
    const words = `${told.kind === 'function' ? 'Function' : 'Answer'} of ${told.project} on ${told.dataset}, lane ${told.lane}`;
    element('div', words, row);
    const when = new Date(told.time * 1000).toLocaleString();
    element('small', waits ? `since ${when}; released by ${told.mode}, ${told.missing} still to approve ` : `${told.state}, came ${when} `, row);
    if (waits) {
      const button = element('button', 'Look at it', row);
      button.addEventListener('click', () => show(told.subject).catch(error => { at('problem').textContent = error.message; at('problem').hidden = false; }));
    }
  }
  at('empty').hidden = at('items').children.length > 0;
  only('list');
}

// JSON with every character that is not plain ASCII written out: nothing in it is unseen.
const plain = value => JSON.stringify(value).replace(/[^\x20-\x7e]/g, c => `\\u${c.charCodeAt(0).toString(16).padStart(4, '0')}`);

// The text with whatever of it nobody sees written out.
const seen = text => text.replace(/[\p{C}\p{Zl}\p{Zp}\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0\ufe00-\ufe0f\u{e0100}-\u{e01ef}]/gu, c => c === '\n' ? c : `\\u{${c.codePointAt(0).toString(16)}}`);

const KINDS = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array, I32: Int32Array, I16: Int16Array, I8: Int8Array, U8: Uint8Array, BOOL: Uint8Array };

async function digest(bytes) {
  const hash = await (crypto.subtle ? crypto.subtle.digest('SHA-256', bytes) : null);
  return hash && Array.from(new Uint8Array(hash), byte => byte.toString(16).padStart(2, '0')).join('');
}

// By tensor, where in the inputs it is named.
function places(spec, path, names) {
  if (!spec || typeof spec !== 'object') { return names; }
  if (typeof spec.tensor === 'string') { (names[spec.tensor] ??= []).push(path || 'it'); }
  for (const [name, part] of Object.entries(spec)) {
    places(part, ['values', 'items', 'state', 'columns'].includes(name) ? path : path ? `${path}.${name}` : name, names);
  }
  return names;
}

// A line for each tensor of a safetensors file: eight bytes of length, a header in JSON, then the values.
function described(buffer, names) {
  if (!buffer.byteLength) { return ['none']; }
  try {
    const length = Number(new DataView(buffer).getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
    return Object.keys(header).filter(name => name !== '__metadata__').sort().map(name => {
      const { dtype, shape, data_offsets: [from, to] } = header[name], kind = KINDS[dtype];
      const about = `${plain((names[name] ?? ['named nowhere']).join(', ')).slice(1, -1)} (tensor ${plain(name).slice(1, -1)}): ${shape.join('x') || 'one'} ${dtype}`;
      if (!kind) { return `${about}; save it to see its values`; }
      const values = Array.from(new kind(buffer.slice(8 + length + from, 8 + length + to)), Number), known = values.filter(Number.isFinite);
      if (!values.length) { return `${about}, empty`; }
      const low = known.reduce((a, b) => Math.min(a, b), Infinity), high = known.reduce((a, b) => Math.max(a, b), -Infinity);
      const span = known.length ? `${Number(low.toPrecision(6))} to ${Number(high.toPrecision(6))}` : 'nothing finite';
      const more = known.length < values.length ? `; ${values.length - known.length} not finite` : '';
      const first = values.slice(0, 8).map(v => Number(v.toPrecision(6))).join(', ');
      return `${about}, ${span}${more}; begins ${first}${values.length > 8 ? ' ...' : ''}`;
    });
  } catch { return ['cannot be read as tensors: the function will get nothing that can, either']; }
}

async function inputs(subject, hash) {
  const headers = { 'Content-Type': 'application/json', Authorization: `Bearer ${token}` };
  const reply = await fetch('/console/inputs', { method: 'POST', headers, body: JSON.stringify({ text: subject }) });
  if (!reply.ok) { throw new Error('The inputs were not shown.'); }
  const buffer = await reply.arrayBuffer(), found = await digest(buffer);
  if (found && found !== hash) { throw new Error('The site showed other inputs than those that wait. Do not sign.'); }
  return buffer;
}

function facts(pairs) {
  at('facts').replaceChildren();
  for (const [name, value] of pairs) { element('dt', name, at('facts')); element('dd', String(value), at('facts')); }
}

// The changes of the source, line by line: the longest common part stays, as in a diff.
function lines(old, now) {
  if (old.length * now.length > 4e6) { return ['The source is another, and too long to compare here: read all of it.']; }
  const best = Array.from({ length: old.length + 1 }, () => new Uint32Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) { best[i][j] = old[i] === now[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]); }
  }
  const told = [];
  let i = 0, j = 0;
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) { i++; j++; }
    else if (i < old.length && (j === now.length || best[i + 1][j] >= best[i][j + 1])) { told.push(`- line ${i + 1}: ${old[i++]}`); }
    else { told.push(`+ line ${j + 1}: ${now[j++]}`); }
  }
  return told;
}

function changed(now, before) {
  if (!before) { return 'No function of this project was approved on this dataset before.'; }
  const names = Object.keys({ ...before.asks, ...now.asks }).filter(name => name !== 'source');
  const told = names.filter(name => plain(now.asks[name] ?? null) !== plain(before.asks[name] ?? null))
    .map(name => `${name}: was ${plain(before.asks[name] ?? null)}, is ${plain(now.asks[name] ?? null)}`);
  for (const name of ['site', 'split', 'environment', 'policy', 'researcher']) {
    if (now[name] !== before[name]) { told.push(`${name}: was ${before[name]}, is ${now[name]}`); }
  }
  told.push(...lines(before.asks.source.split('\n'), now.asks.source.split('\n')));
  return told.join('\n') || 'Nothing changed.';
}

function made(asks) {
  return [['of patients where', asks.where], ['columns made', asks.derive]].filter(([, value]) => value && Object.keys(value).length).map(([name, value]) => [name, plain(value)]);
}

async function show(subject) {
  const look = ++looks;
  const told = await ask('item', { text: subject });
  const hash = await digest(new TextEncoder().encode(told.document));
  if (hash && hash !== told.subject) { throw new Error('The site showed another document than the one that waits. Do not sign.'); }
  const document_ = JSON.parse(told.document), isFunction = told.kind === 'function';
  const buffer = isFunction ? await inputs(told.subject, document_.asks.tensors) : null;
  if (look !== looks) { return; } // another was looked at since: what is shown and what is signed stay one
  shown = told;
  at('item-title').textContent = isFunction ? 'A function asks to run' : 'An answer asks to leave';
  const common = [['subject', told.subject], ['project', told.project], ['dataset', told.dataset], ['researcher', told.researcher], ['released by', told.mode], ['still to approve', told.missing]];
  if (isFunction) {
    facts([...common, ['runs', document_.asks.name], ['columns', document_.asks.columns.join(', ')], ...(document_.asks.tables?.length ? [['all rows that count of', document_.asks.tables.join(', ')]] : []), ['split', document_.split], ['time', `${document_.asks.seconds} s`], ['costs', 'no epsilon: it has no privacy guarantee'], ...made(document_.asks), ['environment', document_.environment]]);
    at('inputs').textContent = JSON.stringify(document_.asks.inputs, null, 1).replace(/[^\n\x20-\x7e]/g, c => plain(c).slice(1, -1));
    at('tensors').textContent = seen([`SHA-256 ${document_.asks.tensors}`, ...described(buffer, places(document_.asks.inputs, '', Object.create(null)))].join('\n'));
    at('save-inputs').hidden = !buffer.byteLength;
    held = buffer;
    at('source').textContent = document_.asks.source;
    at('changes').textContent = changed(document_, told.before ? JSON.parse(told.before) : null);
  } else {
    const release = document_.release;
    const price = release.op === 'review' ? 'NO differential privacy: what you approve is all that protects the patients' : `epsilon ${release.epsilon}, delta ${release.delta} per patient`;
    facts([...common, ['asked', `${release.op} on ${release.split}`], ['guarantee', price]]);
    at('values').textContent = seen(JSON.stringify(release.values, null, 1));
  }
  at('source-part').hidden = !isFunction; at('values-part').hidden = isFunction;
  at('findings').replaceChildren();
  for (const line of told.findings.length ? told.findings : ['nothing found']) { element('li', seen(line), at('findings'), told.findings.length && document_.release?.op === 'review' ? 'warn' : ''); }
  at('reason').value = ''; at('decision-line').value = '';
  only('item');
}

function decide(act) {
  const reason = at('reason').value.trim();
  if (act === 'refuse' && !reason) { throw new Error('Give a reason: the researcher is told it.'); }
  save('decision.json', { sign: act, item: shown, reason });
}

on('challenge', async () => { login = await ask('challenge'); save('log-in.json', login); });
on('enter', async () => {
  const told = await ask('login', JSON.parse(at('login-line').value));
  token = told.token;
  policy = told.policy;
  at('who').textContent = `${login ? login.site : ''} · ${told.key}`;
  at('login-line').value = '';
  await list();
});
on('save-inputs', () => save('inputs.safetensors', held));
on('approve', () => decide('approve'));
on('refuse', () => decide('refuse'));
on('send', async () => { await ask('decide', { text: at('decision-line').value.trim() }); await list(); });
on('back', () => { looks++; return list(); });
on('veto', () => save('veto.json', { sign: 'veto', policy, reason: at('veto-reason').value.trim() }));
on('send-veto', async () => {
  await ask('state', { text: at('veto-line').value.trim() });
  at('who').textContent = 'The policy is no longer in force.';
  only('');
});
