import { Clipboard, Dialog, showDialog } from '@jupyterlab/apputils';
import * as React from 'react';
import { epsilon, figure, splits } from './format';
import { IReceipt, IRelease, ISignature } from './tokens';

export interface ISealedRelease {
  signature: ISignature;
  release: IRelease | null;
}

/** Show the receipt of a verified release: its place in the site's log and the proof of it. */
export async function showReceipt({ signature, release }: ISealedRelease): Promise<void> {
  if (!release?.receipt) {
    return;
  }
  const result = await showDialog({
    title: `Receipt ${release.receipt.index} of ${signature.site}`,
    body: <Receipt receipt={release.receipt} release={release} signature={signature} />,
    buttons: [Dialog.createButton({ label: 'Copy as JSON' }), Dialog.okButton({ label: 'Close' })]
  });
  if (result.button.label === 'Copy as JSON') {
    Clipboard.copyToSystem(JSON.stringify({ release, signature }, null, 2));
  }
}

function Receipt(props: { receipt: IReceipt; release: IRelease; signature: ISignature }): JSX.Element {
  const { receipt, release, signature } = props;
  return (
    <div className="rapha-Receipt" tabIndex={0} role="group" aria-label="Receipt">
      <dl>
        <dt>Release</dt>
        <dd>
          {release.title || release.op}, {release.dataset}, {splits(release.splits ?? [release.split])}
        </dd>
        <dt>Price</dt>
        <dd>
          ε {epsilon(release.epsilon)}, δ {figure(release.delta)}, one {release.unit} more or less
        </dd>
        <dt>Signed with</dt>
        <dd>
          <code>{signature.key}</code>
        </dd>
        <dt>Job</dt>
        <dd>
          <code>{release.job}</code>
        </dd>
      </dl>
      <Part title="Entry in the log" content={decoded(receipt.entry)} />
      <Part title="Inclusion proof" content={receipt.proof} />
      <Part title="Checkpoint" content={receipt.checkpoint} />
    </div>
  );
}

/** A log entry as its JSON, where it is base64 of some. */
function decoded(entry: unknown): unknown {
  try {
    return JSON.parse(atob(String(entry)));
  } catch {
    return entry;
  }
}

function Part({ title, content }: { title: string; content: unknown }): JSX.Element | null {
  if (content === null || content === undefined) {
    return null;
  }
  const shown = typeof content === 'string' ? content : JSON.stringify(content, null, 2);
  return (
    <>
      <h3>{title}</h3>
      <pre tabIndex={0} aria-label={title}>
        {shown}
      </pre>
    </>
  );
}
