import * as React from 'react';
import { ISites } from './tokens';

/** Draw the component again whenever the sites or jobs change. */
export function useSites(sites: ISites): void {
  const [, again] = React.useReducer((count: number) => count + 1, 0);
  React.useEffect(() => {
    sites.stateChanged.connect(again);
    return () => {
      sites.stateChanged.disconnect(again);
    };
  }, [sites]);
}
