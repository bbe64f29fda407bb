# Names for commands, and nothing more.

NODES ?= 3
STATE ?= target/cluster
CLUSTER = cargo build -q -p margay-tests --bins && cargo run -q -p margay-tests --bin margay-cluster --

.PHONY: cluster cluster-down

# A real Kubernetes on this machine, its nodes NotReady; `. target/cluster/env` to use it.
cluster:
	$(CLUSTER) up --nodes $(NODES) --state $(STATE)

cluster-down:
	$(CLUSTER) down --state $(STATE)
