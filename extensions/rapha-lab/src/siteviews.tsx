import * as React from 'react';
import { short } from './format';
import { ISite } from './tokens';

/** The sites this machine knows, each with what was verified of it. */
export function Sites({ sites }: { sites: readonly ISite[] }): JSX.Element {
  return (
    <>
      {sites.map(site => (
        <Site key={site.name} site={site} />
      ))}
    </>
  );
}

function Site({ site }: { site: ISite }): JSX.Element {
  const { policy, verdict } = site;
  return (
    <article className="rapha-Site" aria-label={`Site ${site.name}`}>
      <header className="rapha-Card-head">
        <strong>{site.name}</strong>
        <span className="rapha-Chip" data-alive={site.alive}>
          {site.alive ? 'answers' : 'does not answer'}
        </span>
        {site.simulated && <span className="rapha-Chip rapha-mod-simulated">simulated enclave</span>}
      </header>
      <dl className="rapha-Facts">
        <Fact term="Address">{site.url}</Fact>
        <Fact term="Attestation">
          {verdict.status}
          {verdict.reasons.length > 0 && (
            <ul>
              {verdict.reasons.map(reason => (
                <li key={reason}>{reason}</li>
              ))}
            </ul>
          )}
        </Fact>
        <Fact term="Measurement">
          <Hash value={site.measurement} />
        </Fact>
        <Fact term="Sandbox">{site.tier && `tier ${site.tier}`}</Fact>
        <Fact term="Policy">
          {policy?.name} <Hash value={policy?.hash} />
        </Fact>
        <Fact term="Signed by">{policy?.signers?.join(', ')}</Fact>
        <Fact term="Expires">{policy?.expires}</Fact>
      </dl>
    </article>
  );
}

/** A term with its fact; nothing at all where there is no fact. */
export function Fact(props: { term: string; children: React.ReactNode }): JSX.Element | null {
  const { children } = props;
  if (children === null || children === undefined || children === '') {
    return null;
  }
  return (
    <>
      <dt>{props.term}</dt>
      <dd>{children}</dd>
    </>
  );
}

function Hash({ value }: { value?: string }): JSX.Element | null {
  return value ? <code title={value}>{short(value)}</code> : null;
}
