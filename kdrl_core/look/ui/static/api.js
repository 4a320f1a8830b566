// Fetches the server's answers. An error has the server's message.

export async function get(path, params, signal) {
  const query = new URLSearchParams(params).toString();
  let answer;
  try {
    answer = await fetch(`/api/${path}${query ? `?${query}` : ""}`, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("kdrl ui does not answer: has it been stopped? Start it again, then reload");
  }
  const body = await answer.json().catch(() => ({ error: `status ${answer.status}` }));
  if (!answer.ok) throw new Error(body.error);
  return body;
}

/** Steps of a run (or of all) as rows with a `metrics` object; kept until there is something new. */
let kept = { revision: -1, steps: null };
export function steps(revision) {
  if (kept.revision !== revision)
    kept = { revision, steps: get("steps").then(rowsOf) };
  return kept.steps.catch((error) => {
    kept.revision = -1;
    throw error;
  });
}

function rowsOf({ num_steps, columns, metrics }) {
  const names = Object.keys(columns), ofMetrics = Object.keys(metrics);
  return Array.from({ length: num_steps }, (_, i) => {
    const row = Object.fromEntries(names.map((name) => [name, columns[name][i]]));
    row.metrics = Object.fromEntries(ofMetrics.map((name) => [name, metrics[name][i]]));
    return row;
  });
}
