import * as React from 'react';
import { epsilon } from './format';
import { IBudget } from './tokens';

/** A budget as a bar and in words; the words alone say all of it. */
export function Gauge({ label, budget }: { label: string; budget: IBudget }): JSX.Element {
  const left = Math.max(0, budget.left);
  const share = budget.epsilon > 0 ? Math.min(1, left / budget.epsilon) : 0;
  const room = budget.room === undefined ? '' : `, room for ε ${epsilon(budget.room, 'down')} at once`;
  const words = `ε ${epsilon(left, 'down')} of ${epsilon(budget.epsilon)} left${room}`;
  return (
    <div className="rapha-Gauge">
      <span className="rapha-Gauge-label">{label}</span>
      <span className="rapha-Gauge-words" title={about(budget)}>
        {left > 0 || budget.room ? words : `spent: ${words}`}
      </span>
      <div
        className="rapha-Bar"
        role="meter"
        aria-label={`Budget of ${label}`}
        aria-valuemin={0}
        aria-valuemax={budget.epsilon}
        aria-valuenow={left}
        aria-valuetext={words}
      >
        <div className="rapha-Bar-fill" style={{ width: `${100 * share}%` }} data-low={share < 0.2} />
      </div>
    </div>
  );
}

/** What the two figures are, in the words of the notebook's own card. */
function about({ delta, spent }: IBudget): string {
  return (
    `ε ${epsilon(spent)} spent, δ ${delta}. left: the budget less the guarantee of all answers together. ` +
    'room: the largest ε of a single one that is admitted next.'
  );
}
