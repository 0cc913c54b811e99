import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import * as React from 'react';
import { addCard } from './card';
import { closedIcon } from './icons';
import { insertBelow } from './insert';
import { IBlocked, Mime } from './tokens';

/** Draws a refusal: what, why, what to ask instead, and a button that puts the suggestion into a new cell. */
export const blocked: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:blocked',
  description: 'Draws refusals, with what to ask instead.',
  autoStart: true,
  requires: [IRenderMimeRegistry, INotebookTracker],
  activate: (_: JupyterFrontEnd, registry: IRenderMimeRegistry, tracker: INotebookTracker) => {
    addCard<IBlocked>(registry, Mime.blocked, data => (
      <BlockedCard data={data} insert={(code, from) => insertBelow(tracker, code, from)} />
    ));
  }
};

function BlockedCard(props: {
  data: IBlocked;
  insert: (code: string, from: HTMLElement | null) => void;
}): JSX.Element {
  const { what, why, instead, suggestion, line, kind, said } = props.data;
  const root = React.useRef<HTMLElement>(null);
  const insert = () => props.insert(suggestion!, root.current);
  return (
    <section className="rapha-Card rapha-Blocked" aria-label="Blocked" ref={root}>
      {said && (
        <div className="rapha-Blocked-said">
          What the rehearsal on made-up patients showed before that:
          <pre tabIndex={0} aria-label="What the rehearsal showed">
            {said}
          </pre>
        </div>
      )}
      <header className="rapha-Card-head">
        <closedIcon.react tag="span" className="rapha-Card-icon" width="16px" />
        <strong>Blocked</strong>
        {kind && <code className="rapha-Card-kind">{kind}</code>}
        {typeof line === 'number' && <span className="rapha-Card-aside">line {line} of the cell</span>}
      </header>
      <p className="rapha-Blocked-what">{what}</p>
      <dl className="rapha-Blocked-why">
        {why && <Item term="Why">{why}</Item>}
        {instead && <Item term="Instead">{instead}</Item>}
      </dl>
      {suggestion && (
        <div className="rapha-Blocked-suggestion">
          <pre tabIndex={0} aria-label="Suggested cell">
            {suggestion}
          </pre>
          <button className="rapha-Button" onClick={insert}>
            Insert as a new cell
          </button>
        </div>
      )}
    </section>
  );
}

function Item(props: { term: string; children: React.ReactNode }): JSX.Element {
  return (
    <>
      <dt>{props.term}</dt>
      <dd>{props.children}</dd>
    </>
  );
}
