// The same answers as hello.py ("/", "/pid"), stream.py ("/stream") and work.py ("/work?ms=") from Node's own cluster.
// node hello_cluster.js PORT WORKERS [APP [KEEP_ALIVE_SECONDS]]; NODE_CLUSTER_SCHED_POLICY=rr|none is read by Node.
'use strict';

const cluster = require('node:cluster');
const http = require('node:http');

const [port, workers] = process.argv.slice(2, 4).map(Number);
const [app, keepAliveSeconds] = process.argv.slice(4);
const BODY = 'hello world\n';
const PID = `${process.pid}\n`;
const HOLD_MILLISECONDS = 50;
const AWAIT_MILLISECONDS = 50;

function answer(res, body) {
  res.writeHead(200, { 'content-type': 'text/plain', 'content-length': body.length });
  res.end(body);
}

// Blocks the event loop without burning the processor: see hold_the_event_loop in common.py.
function hold(milliseconds) {
  if (milliseconds) Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, milliseconds);
}

function burn(milliseconds) {
  const used = () => { const { user, system } = process.cpuUsage(); return (user + system) / 1000; };
  for (const end = used() + milliseconds; used() < end;);
}

function work(req, res) {
  const milliseconds = Number(req.url.split('ms=')[1] || 0);
  if (app === 'awaiting') {
    setTimeout(() => { burn(milliseconds); answer(res, BODY); }, AWAIT_MILLISECONDS);
  } else if (app === 'post') {
    req.resume().on('end', () => { hold(milliseconds); answer(res, BODY); });
  } else {
    hold(milliseconds);
    answer(res, BODY);
  }
}

function serve(req, res) {
  if (req.url.startsWith('/work')) {
    work(req, res);
  } else if (req.url === '/pid') {
    hold(HOLD_MILLISECONDS);
    answer(res, PID);
  } else if (req.url === '/stream') {
    res.writeHead(200, { 'content-type': 'text/plain' });
    res.write(PID);
  } else {
    answer(res, BODY);
  }
}

if (cluster.isPrimary) {
  for (let i = 0; i < workers; i += 1) cluster.fork();
  // A worker that was killed is replaced, as the others' are; one that cannot start would be for ever, so not that one.
  cluster.on('listening', (worker) => worker.once('exit', (code, signal) => { if (signal === 'SIGKILL') cluster.fork(); }));
} else {
  const server = http.createServer(serve);
  if (keepAliveSeconds) server.keepAliveTimeout = Number(keepAliveSeconds) * 1000;
  // As long a backlog as the Python servers ask for.
  server.listen({ port, host: '127.0.0.1', backlog: 2048 });
}
