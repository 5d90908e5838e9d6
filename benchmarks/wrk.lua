-- Asks for the given paths in turn, and prints what happened as one line of JSON.
-- wrk … -- AUTHORIZATION FILE_OF_PATHS

local paths = {}
local next_path = 0

function init(arguments)
  wrk.headers["Authorization"] = arguments[1]
  for path in io.lines(arguments[2]) do
    paths[#paths + 1] = wrk.format("GET", path)
  end
end

function request()
  next_path = next_path % #paths + 1
  return paths[next_path]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"duration_us":%d,"bytes":%d,"failed":%d,"p50_us":%d,"p99_us":%d}\n',
    summary.requests, summary.duration, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
