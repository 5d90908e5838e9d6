/** Who is signed in: a token from the address's fragment, kept in memory and for the tab's life. */

const KEY = "exportd-token";
let token = null;

/** The fragment's fields (`token`, `job`), which leave the address bar, and the history, with this. */
export function takeFragment() {
  const fields = new URLSearchParams(location.hash.slice(1));
  if (fields.has("token")) {
    signIn(fields.get("token"));
    fields.delete("token");
    history.replaceState(null, "", `${location.pathname}${location.search}${fields.size ? `#${fields}` : ""}`);
  } else {
    token ??= readStored();
  }
  return { jobId: fields.get("job") };
}

export function currentToken() {
  return token;
}

export function signIn(given) {
  token = given.trim().replace(/^Bearer\s+/i, "") || null;
  try {
    if (token) sessionStorage.setItem(KEY, token);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Storage may be forbidden; then a reload signs out.
  }
}

function readStored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
