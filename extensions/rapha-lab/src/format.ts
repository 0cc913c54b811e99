/** A number with as many digits as its error leaves meaning. */
export function value(x: number | string | null, error?: number | null): string {
  if (typeof x !== 'number') {
    return x === null ? 'none' : String(x);
  }
  if (!error || !isFinite(error) || !isFinite(x)) {
    return figure(x);
  }
  const digits = Math.min(Math.max(1 - Math.floor(Math.log10(Math.abs(error))), 0), 12);
  return x.toFixed(digits);
}

/** At most four significant digits, without an exponent where a reader needs none. */
export function figure(x: number): string {
  if (Number.isInteger(x) && Math.abs(x) < 1e9) {
    return x.toLocaleString('en');
  }
  const exponent = Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4;
  return exponent ? Number(x.toPrecision(3)).toExponential() : String(Number(x.toPrecision(4)));
}

/** ε to three decimals: what is spent is rounded up, what is left is rounded down. */
export function epsilon(x: number, round: 'up' | 'down' = 'up'): string {
  const scaled = Number((x * 1000).toPrecision(12));
  return String((round === 'up' ? Math.ceil(scaled) : Math.floor(scaled)) / 1000);
}

/** Whose patients were looked at: "train and validation splits". */
export function splits(names: string[]): string {
  return names.includes('all') ? 'all splits' : `${names.join(' and ')} split${names.length > 1 ? 's' : ''}`;
}

/** A span of time in words: "3 min 20 s". */
export function duration(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) {
    return `${s} s`;
  }
  const [hours, minutes] = [Math.floor(s / 3600), Math.floor((s % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${s % 60} s`;
}

/** The first characters of a hash, for a place where the whole does not fit. */
export function short(hash: string): string {
  return hash.length > 16 ? `${hash.slice(0, 12)}…` : hash;
}
