#!/bin/sh
# What must be done before the first worker starts, such as migrations, goes here.
set -eu

# exec: signals go to clusterserve, and its exit code is the container's.
exec clusterserve "$@"
