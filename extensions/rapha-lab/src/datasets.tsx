import * as React from 'react';
import { Gauge } from './gauge';
import { Fact } from './siteviews';
import { IColumn, IDataset, ISite } from './tokens';

/** The datasets of all sites: what the schema says of them, and what is left of each budget. */
export function Datasets({ datasets }: { datasets: { site: ISite; dataset: IDataset }[] }): JSX.Element {
  return (
    <>
      {datasets.map(({ site, dataset }) => (
        <Dataset key={`${site.name} ${dataset.name}`} site={site} dataset={dataset} />
      ))}
    </>
  );
}

function Dataset({ site, dataset }: { site: ISite; dataset: IDataset }): JSX.Element {
  const { columns, patient, tables } = dataset.schema;
  return (
    <article className="rapha-Dataset" aria-label={`Dataset ${dataset.name}`}>
      <header className="rapha-Card-head">
        <strong>{dataset.name}</strong>
        <span className="rapha-Card-aside">at {site.name}</span>
      </header>
      <dl className="rapha-Facts">
        <Fact term="About">{dataset.title}</Fact>
        <Fact term="Unit">one patient, by {patient}</Fact>
      </dl>
      {Object.entries(dataset.budget ?? {}).map(([project, splits]) => (
        <div key={project} className="rapha-Budget">
          <h3>Budget of {project}</h3>
          {Object.entries(splits).map(([split, budget]) => (
            <Gauge key={split} label={split} budget={budget} />
          ))}
        </div>
      ))}
      {columns.length > 0 && <Columns label={`${columns.length} columns`} columns={columns} />}
      {(tables ?? []).map(table => (
        <Columns
          key={table.name}
          label={`${table.name}: at most ${table.most} rows a patient`}
          columns={table.columns.map(column => ({ ...column, name: `${table.name}.${column.name}` }))}
        />
      ))}
    </article>
  );
}

function Columns({ label, columns }: { label: string; columns: IColumn[] }): JSX.Element {
  return (
    <details className="rapha-Columns">
      <summary>{label}</summary>
      <ul>
        {columns.map(column => (
          <Column key={column.name} column={column} />
        ))}
      </ul>
    </details>
  );
}

function Column({ column }: { column: IColumn }): JSX.Element {
  const range = column.bounds ? `${column.bounds[0]} to ${column.bounds[1]}` : column.categories?.join(', ');
  return (
    <li title={column.meaning}>
      <code>{column.name}</code> {column.type}
      {range && `, ${range}`} {column.unit}
    </li>
  );
}
