import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import * as React from 'react';
import { addCard } from './card';
import { epsilon, figure, splits, value } from './format';
import { IRelease, Mime } from './tokens';

const MOST = 60;

type Row = IRelease['rows'][number];

/** Draws what the curator released: each value with its error, and what it cost. */
export const release: JupyterFrontEndPlugin<void> = {
  id: 'rapha-lab:release',
  description: 'Draws releases, each value with its error.',
  autoStart: true,
  requires: [IRenderMimeRegistry],
  activate: (_: JupyterFrontEnd, registry: IRenderMimeRegistry) => {
    addCard<IRelease>(registry, Mime.release, data => <ReleaseCard data={data} />);
  }
};

function ReleaseCard({ data }: { data: IRelease }): JSX.Element {
  const rows = data.rows ?? [];
  return (
    <section className="rapha-Card rapha-Release" aria-label="Release">
      <p className="rapha-Release-title">{data.title || data.op}</p>
      {rows.length > 0 && <Rows rows={rows} />}
      {rows.length > MOST && <p className="rapha-Note">{rows.length - MOST} more rows in the value itself.</p>}
      <p className="rapha-Release-price">
        {data.op === 'review' ? (
          <span>no ε: outside every privacy guarantee</span>
        ) : (
          <span>
            ε {epsilon(data.epsilon)}, δ {figure(data.delta)}
          </span>
        )}
        {data.op !== 'review' && <span>one {data.unit} more or less</span>}
        <span>
          {data.dataset}, {splits(data.splits ?? [data.split])}
        </span>
      </p>
    </section>
  );
}

function Rows({ rows }: { rows: Row[] }): JSX.Element {
  const scale = whiskers(rows);
  const errors = rows.some(({ error, interval }) => error || interval);
  return (
    <table>
      <thead>
        <tr>
          <th scope="col">Name</th>
          <th scope="col">Value</th>
          {errors && <th scope="col">Error</th>}
          {errors && <th scope="col">95 % interval</th>}
          {scale && <td />}
        </tr>
      </thead>
      <tbody>
        {rows.slice(0, MOST).map((row, index) => (
          <ReleaseRow key={index} row={row} errors={errors} scale={scale} />
        ))}
      </tbody>
    </table>
  );
}

function ReleaseRow(props: { row: Row; errors: boolean; scale: [number, number] | null }): JSX.Element {
  const { row, errors, scale } = props;
  const { name, value: shown, error, interval } = row;
  return (
    <tr>
      <th scope="row">{name}</th>
      <td className="rapha-mod-number">{value(shown, error)}</td>
      {errors && <td className="rapha-mod-number">{error ? `± ${value(error, error)}` : ''}</td>}
      {errors && (
        <td className="rapha-mod-number">
          {interval && `${value(interval[0], error)} to ${value(interval[1], error)}`}
        </td>
      )}
      {scale && (
        <td className="rapha-Whiskers">
          {interval && typeof shown === 'number' && (
            <Whisker at={shown} from={interval[0]} to={interval[1]} scale={scale} />
          )}
        </td>
      )}
    </tr>
  );
}

/** A dot with its interval, on the scale all rows share. */
function Whisker(props: { at: number; from: number; to: number; scale: [number, number] }): JSX.Element {
  const [low, high] = props.scale;
  const x = (v: number) => 4 + (172 * (v - low)) / (high - low);
  return (
    <svg className="rapha-Whisker" width="180" height="14" aria-hidden="true">
      <line className="rapha-Whisker-zero" x1={x(0)} x2={x(0)} y1="0" y2="14" />
      <line x1={x(props.from)} x2={x(props.to)} y1="7" y2="7" />
      <line x1={x(props.from)} x2={x(props.from)} y1="4" y2="10" />
      <line x1={x(props.to)} x2={x(props.to)} y1="4" y2="10" />
      <circle cx={x(props.at)} cy="7" r="3" />
    </svg>
  );
}

/** The range of zero and all intervals, or null where fewer than two rows could be compared. */
function whiskers(rows: Row[]): [number, number] | null {
  const ends = rows.flatMap(row => row.interval ?? []).filter(isFinite);
  if (ends.length < 4) {
    return null;
  }
  const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
  return high > low ? [low, high] : null;
}
