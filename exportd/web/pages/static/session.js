/** The signed-in user: a token from the URL's fragment, kept in memory and in the tab's session storage. */

const KEY = "exportd-token";
let token = null;

/**
 * The fragment's fields (`token`, `job`). Removes the token from the address bar; the browser's history may keep the
 * URL as it was opened. Calls `mayReplace` before another user's token replaces the current one, because anybody can
 * send a link with a token of their own.
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
    // The browser may forbid storage. Then a reload signs out.
  }
}

/** Whether two tokens differ only in their times. The page does not know which claim names the user. */
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
