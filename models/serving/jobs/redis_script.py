"""What the Redis store does, in Lua: each operation runs on the server as one step. KEYS[1] is the prefix of every key.

Keys: `job:<id>` hash, `work:<id>` and `answer:<id>` bodies, `queue` stream of job ids with the consumer group `workers`,
`delayed`, `expires`, `hooks` sorted by time, `owner:<tag>` jobs of one owner by age, `load` counters, `crashed` ids to fail.
"""

SCRIPT = """
local P, op = KEYS[1], ARGV[1]
local QUEUE, LOAD = P .. 'queue', P .. 'load'
local function hash(id) return P .. 'job:' .. id end
local function field(id, name) return redis.call('HGET', hash(id), name) end

local function charge(tenant, jobs, bytes)
  redis.call('HINCRBY', LOAD, 'jobs', jobs)
  redis.call('HINCRBY', LOAD, 'bytes', bytes)
  local left = redis.call('HINCRBY', LOAD, 'jobs' .. tenant, jobs)
  local held = redis.call('HINCRBY', LOAD, 'bytes' .. tenant, bytes)
  if left == 0 and held == 0 then redis.call('HDEL', LOAD, 'jobs' .. tenant, 'bytes' .. tenant) end
end

local function enqueue(id)
  redis.call('HSET', hash(id), 'entry', redis.call('XADD', QUEUE, '*', 'job', id))
end

local function dequeue(entry)
  if entry and entry ~= '' then
    redis.call('XACK', QUEUE, 'workers', entry)
    redis.call('XDEL', QUEUE, entry)
  end
end

local function leave(id)
  dequeue(field(id, 'entry'))
  redis.call('ZREM', P .. 'delayed', id)
  redis.call('SREM', P .. 'crashed', id)
end

local function drop(id, unfinished)
  leave(id)
  charge(field(id, 'tag'), unfinished, -tonumber(field(id, 'size')))
  redis.call('ZREM', P .. 'owner:' .. field(id, 'owner'), id)
  redis.call('ZREM', P .. 'expires', id)
  redis.call('ZREM', P .. 'hooks', id)
  redis.call('DEL', hash(id), P .. 'work:' .. id, P .. 'answer:' .. id)
end

local function finish(id, state, now, err, status, added)
  leave(id)
  local change = added - redis.call('STRLEN', P .. 'work:' .. id)
  local expires = string.format('%.6f', tonumber(now) + tonumber(field(id, 'ttl')))
  redis.call('DEL', P .. 'work:' .. id)
  charge(field(id, 'tag'), -1, change)
  redis.call('HINCRBY', hash(id), 'size', change)
  redis.call('HSET', hash(id), 'state', state, 'updated', now, 'expires', expires, 'entry', '', 'worker', '',
    'error', err, 'error_status', status)
  redis.call('ZADD', P .. 'expires', expires, id)
  if field(id, 'webhook') ~= '' then redis.call('ZADD', P .. 'hooks', now, id) end
end

local function runs(id, worker) return field(id, 'state') == 'running' and field(id, 'worker') == worker end
local function whole(id) return redis.call('HGETALL', hash(id)) end
local ops = {}

-- The first entry that nobody has held on to for `lease` ms. One call looks at ten entries only.
local function lapsed(worker, lease)
  local cursor = '0-0'
  for _ = 1, 200 do
    local found = redis.call('XAUTOCLAIM', QUEUE, 'workers', worker, lease, cursor, 'COUNT', 1)
    if #found[2] > 0 then return found[2] end
    cursor = found[1]
    if cursor == '0-0' then return nil end
  end
end

function ops.add()
  local id, tag, owner, size = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
  local used = redis.call('HMGET', LOAD, 'jobs', 'bytes', 'jobs' .. tag, 'bytes' .. tag)
  for i = 1, 4 do used[i] = tonumber(used[i] or 0) end
  for i = 1, 4 do
    local more = size
    if i % 2 == 1 then more = 1 end
    if used[i] + more > tonumber(ARGV[8 + i]) then return used end
  end
  redis.call('HSET', hash(id), 'tag', tag, 'owner', owner, unpack(ARGV, 13))
  redis.call('SET', P .. 'work:' .. id, ARGV[8])
  redis.call('ZADD', P .. 'owner:' .. owner, ARGV[6], id)
  redis.call('ZADD', P .. 'expires', ARGV[7], id)
  charge(tag, 1, size)
  enqueue(id)
  return false
end

function ops.find()
  local found = {}
  for i = 2, #ARGV do found[#found + 1] = whole(ARGV[i]) end
  return found
end

function ops.list()
  local found = {}
  for _, id in ipairs(redis.call('ZREVRANGE', P .. 'owner:' .. ARGV[2], 0, tonumber(ARGV[3]) - 1)) do
    found[#found + 1] = whole(id)
  end
  return found
end

function ops.claim()
  local worker, now, lease, most = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
  redis.pcall('XGROUP', 'CREATE', QUEUE, 'workers', '0', 'MKSTREAM')
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'delayed', '-inf', now, 'LIMIT', 0, 10)) do
    redis.call('ZREM', P .. 'delayed', id)
    enqueue(id)
  end
  for _ = 1, 20 do
    local entries = lapsed(worker, lease)
    if not entries then
      local read = redis.call('XREADGROUP', 'GROUP', 'workers', worker, 'COUNT', 1, 'STREAMS', QUEUE, '>')
      if not read then return false end
      entries = read[1][2]
    end
    local entry, id = entries[1][1], entries[1][2][2]
    local state = field(id, 'state')
    if (state ~= 'queued' and state ~= 'running') or tonumber(field(id, 'expires')) <= tonumber(now) then
      dequeue(entry)
    elseif tonumber(field(id, 'attempts')) >= most then
      dequeue(entry)
      redis.call('SADD', P .. 'crashed', id)
    else
      redis.call('HINCRBY', hash(id), 'attempts', 1)
      redis.call('HSET', hash(id), 'state', 'running', 'worker', worker, 'updated', now, 'entry', entry)
      return {whole(id), redis.call('GET', P .. 'work:' .. id)}
    end
  end
  return false
end

function ops.renew()
  local kept = {}
  for i = 3, #ARGV do
    if runs(ARGV[i], ARGV[2]) then
      redis.call('XCLAIM', QUEUE, 'workers', ARGV[2], 0, field(ARGV[i], 'entry'), 'JUSTID')
      kept[#kept + 1] = ARGV[i]
    end
  end
  return kept
end

function ops.release()
  local id, worker, now, due = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
  if not runs(id, worker) then return false end
  leave(id)
  redis.call('HINCRBY', hash(id), 'attempts', -1)
  redis.call('HINCRBY', hash(id), 'backoffs', 1)
  redis.call('HSET', hash(id), 'state', 'queued', 'worker', '', 'entry', '', 'updated', now)
  redis.call('ZADD', P .. 'delayed', due, id)
  return false
end

function ops.fail()
  if not runs(ARGV[2], ARGV[3]) then return false end
  finish(ARGV[2], 'failed', ARGV[4], ARGV[5], ARGV[6], 0)
  return whole(ARGV[2])
end

function ops.succeed()
  local id, body = ARGV[2], ARGV[7]
  if not runs(id, ARGV[3]) then return false end
  local held = tonumber(redis.call('HGET', LOAD, 'bytes')) - redis.call('STRLEN', P .. 'work:' .. id)
  if held + #body > tonumber(ARGV[9]) then
    finish(id, 'failed', ARGV[4], ARGV[5], ARGV[6], 0)
  else
    redis.call('SET', P .. 'answer:' .. id, body)
    redis.call('HSET', hash(id), 'answer_header', ARGV[8])
    finish(id, 'succeeded', ARGV[4], '', 0, #body)
  end
  return whole(id)
end

function ops.answer()
  local body = redis.call('GET', P .. 'answer:' .. ARGV[2])
  return body and {body, field(ARGV[2], 'answer_header')}
end

function ops.cancel()
  local id, now, state = ARGV[2], ARGV[3], field(ARGV[2], 'state')
  if state == 'queued' then
    redis.call('HSET', hash(id), 'state', 'cancelled', 'updated', now)
    local left = whole(id)
    drop(id, -1)
    return left
  elseif state == 'running' then
    finish(id, 'cancelled', now, '', 0, 0)
  end
  return whole(id)
end

function ops.sweep()
  local now, most, ended = ARGV[2], ARGV[3], {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'expires', '-inf', now, 'LIMIT', 0, most)) do
    local state = field(id, 'state')
    if state == 'queued' or state == 'running' then
      finish(id, 'failed', now, ARGV[4], 504, 0)
      ended[#ended + 1] = whole(id)
    else
      drop(id, 0)
    end
  end
  for _, id in ipairs(redis.call('SRANDMEMBER', P .. 'crashed', most)) do
    finish(id, 'failed', now, ARGV[5], 500, 0)
    ended[#ended + 1] = whole(id)
  end
  return ended
end

function ops.hooks()
  local due = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'hooks', '-inf', ARGV[2], 'LIMIT', 0, ARGV[4])) do
    redis.call('ZADD', P .. 'hooks', ARGV[3], id)
    redis.call('HINCRBY', hash(id), 'hook_tries', 1)
    due[#due + 1] = whole(id)
  end
  return due
end

function ops.hooked()
  if ARGV[3] == '' then
    redis.call('ZREM', P .. 'hooks', ARGV[2])
  else
    redis.call('ZADD', P .. 'hooks', 'XX', ARGV[3], ARGV[2])
  end
  return false
end

return ops[op]()
"""
