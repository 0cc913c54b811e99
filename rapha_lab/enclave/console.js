'use strict';
// Everything shown is put in as text, never as markup: sources and answers are foreign.
const at = id => document.getElementById(id);
let token = '', policy = '', shown = null, login = null;

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
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: 'application/json' }));
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

function facts(pairs) {
  at('facts').replaceChildren();
  for (const [name, value] of pairs) { element('dt', name, at('facts')); element('dd', String(value), at('facts')); }
}

function changed(now, before) {
  if (!before) { return 'No function of this project was approved before.'; }
  const told = Object.keys(now.asks).filter(name => name !== 'source' && JSON.stringify(now.asks[name]) !== JSON.stringify(before.asks[name]))
    .map(name => `${name}: was ${JSON.stringify(before.asks[name])}, is ${JSON.stringify(now.asks[name])}`);
  const old = before.asks.source.split('\n'), fresh = now.asks.source.split('\n');
  told.push(...old.filter(line => !fresh.includes(line)).map(line => `- ${line}`), ...fresh.filter(line => !old.includes(line)).map(line => `+ ${line}`));
  if (old.join('\n') !== fresh.join('\n')) { told.push('Lines that only moved or are there more often are not listed: read the whole source.'); }
  for (const name of ['site', 'split', 'environment', 'policy', 'researcher']) {
    if (now[name] !== before[name]) { told.push(`${name}: was ${before[name]}, is ${now[name]}`); }
  }
  return told.join('\n') || 'nothing';
}

async function show(subject) {
  const told = await ask('item', { text: subject });
  const bytes = await (crypto.subtle ? crypto.subtle.digest('SHA-256', new TextEncoder().encode(told.document)) : null);
  const hash = bytes && Array.from(new Uint8Array(bytes), byte => byte.toString(16).padStart(2, '0')).join('');
  if (hash && hash !== told.subject) { throw new Error('The site showed another document than the one that waits. Do not sign.'); }
  shown = told;
  const document_ = JSON.parse(told.document), isFunction = told.kind === 'function';
  at('item-title').textContent = isFunction ? 'A function asks to run' : 'An answer asks to leave';
  const common = [['subject', told.subject], ['project', told.project], ['dataset', told.dataset], ['researcher', told.researcher], ['released by', told.mode], ['still to approve', told.missing]];
  if (isFunction) {
    facts([...common, ['columns', document_.asks.columns.join(', ')], ['split', document_.split], ['time', `${document_.asks.seconds} s`], ['costs', 'no epsilon: it has no privacy guarantee'], ['inputs', JSON.stringify(document_.asks.inputs)], ['environment', document_.environment]]);
    at('source').textContent = document_.asks.source;
    at('changes').textContent = changed(document_, told.before ? JSON.parse(told.before) : null);
  } else {
    const release = document_.release;
    const price = release.op === 'review' ? 'NO differential privacy: what you approve is all that protects the patients' : `epsilon ${release.epsilon}, delta ${release.delta} per patient`;
    facts([...common, ['asked', `${release.op} on ${release.split}`], ['guarantee', price]]);
    at('values').textContent = JSON.stringify(release.values, null, 1);
  }
  at('source-part').hidden = !isFunction; at('values-part').hidden = isFunction;
  at('findings').replaceChildren();
  for (const line of told.findings.length ? told.findings : ['nothing found']) { element('li', line, at('findings'), told.findings.length && document_.release?.op === 'review' ? 'warn' : ''); }
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
on('approve', () => decide('approve'));
on('refuse', () => decide('refuse'));
on('send', async () => { await ask('decide', { text: at('decision-line').value.trim() }); await list(); });
on('back', list);
on('veto', () => save('veto.json', { sign: 'veto', policy, reason: at('veto-reason').value.trim() }));
on('send-veto', async () => {
  await ask('state', { text: at('veto-line').value.trim() });
  at('who').textContent = 'The policy is no longer in force.';
  only('');
});
