/** Who is signed in: a token from the address's fragment, kept in memory and for the tab's life. */

const KEY = "exportd-token";
let token = null;

/**
 * The fragment's fields (`token`, `job`). The token leaves the address bar with this; the browser's history may keep
 * the address as it was opened. `mayReplace` is asked before somebody else's token takes the place of the present one:
 * anybody can send a link with a token of their own.
 */
export function takeFragment(mayReplace) {
  const fields = new URLSearchParams(location.hash.slice(1));
  token ??= readStored();
  if (fields.has("token")) {
    const given = fields.get("token");
    fields.delete("token");
    history.replaceState(
      null,
      "",
      `${location.pathname}${location.search}${fields.size ? `#${fields}` : ""}`,
    );
    if (!token || isSameBearer(given, token) || mayReplace()) signIn(given);
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

/** Whether two tokens say the same, but for their times. Which claim names the user, the page does not know. */
function isSameBearer(one, other) {
  const [first, second] = [one, other].map(readClaims);
  return one === other || (first !== null && first === second);
}

function readClaims(given) {
  try {
    const { exp, iat, nbf, jti, ...claims } = JSON.parse(
      atob(given.split(".")[1].replace(/-/g, "+").replace(/_/g, "/")),
    );
    return JSON.stringify(Object.entries(claims).sort());
  } catch {
    return null;
  }
}

function readStored() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
