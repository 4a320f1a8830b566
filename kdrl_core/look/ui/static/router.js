// The address after # is the whole state of a view: #/rollouts?run=first&stage=stage2&step_min=12&verdict=wrong

export function parse(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  return { view: path || "trends", params: new URLSearchParams(query) };
}

/** An address from `params` (object or URLSearchParams); empty values are left out, lists are repeated. */
export function link(view, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of params instanceof URLSearchParams ? params : Object.entries(params))
    for (const each of Array.isArray(value) ? value : [value])
      if (each !== null && each !== undefined && each !== "") query.append(name, each);
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

export function go(view, params) {
  location.hash = link(view, params);
}

/** Change the address without a new entry in the history and without drawing anew. */
export function note(view, params) {
  history.replaceState(null, "", link(view, params));
}

/** `params` with some of them replaced; null removes. */
export function changed(params, changes) {
  const next = new URLSearchParams(params);
  for (const [name, value] of Object.entries(changes)) {
    next.delete(name);
    for (const each of Array.isArray(value) ? value : [value])
      if (each !== null && each !== undefined && each !== "") next.append(name, each);
  }
  return next;
}
