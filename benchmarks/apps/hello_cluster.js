// The same answers as hello.py ("/", "/pid") and stream.py ("/stream") from Node's own cluster.
// node hello_cluster.js PORT WORKERS; NODE_CLUSTER_SCHED_POLICY=rr|none is read by Node itself.
'use strict';

const cluster = require('node:cluster');
const http = require('node:http');

const [port, workers] = process.argv.slice(2).map(Number);
const BODY = 'hello world\n';
const PID = `${process.pid}\n`;
const HOLD_MILLISECONDS = 50;

function answer(res, body) {
  res.writeHead(200, { 'content-type': 'text/plain', 'content-length': body.length });
  res.end(body);
}

function serve(req, res) {
  if (req.url === '/pid') {
    // Blocks the event loop without burning the processor: see hold_the_event_loop in common.py.
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, HOLD_MILLISECONDS);
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
} else {
  // As long a backlog as the Python servers ask for.
  http.createServer(serve).listen({ port, host: '127.0.0.1', backlog: 2048 });
}
