# Names for commands, and nothing more.

NODES ?= 3
STATE ?= target/cluster
CLUSTER = cargo build -q -p margay-tests --bins && cargo run -q -p margay-tests --bin margay-cluster --
PROGRAMS = cargo build -p margay -p margay-cni -p margay-tests --bins
OURS = -p margay -p margay-api -p margay-calc -p margay-cni -p margay-node -p margay-operator -p margay-proto -p margay-runtime -p margay-typha

.PHONY: check test bless demo bench image cluster cluster-down

# Format, lints, and every test that needs neither root nor a cluster.
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test $(OURS)

# All of it: also the kernel in namespaces and a real Kubernetes of three nodes. Needs root.
test:
	$(PROGRAMS)
	cargo test --workspace --no-fail-fast

# Writes golden texts and generated files anew; look at the diff.
bless:
	UPDATE_EXPECT=1 cargo test $(OURS)

# The whole path with a running commentary. KEEP=1 leaves it up. Needs root.
demo:
	$(PROGRAMS)
	cargo run -q -p margay-tests --bin margay-demo -- $(if $(KEEP),--keep)

# Figures of a real cluster beside their anchors. Needs root, and a quiet machine.
bench:
	$(PROGRAMS)
	cargo run -q -p margay-tests --bin margay-bench

# The image of every component as an OCI archive.
image:
	$(PROGRAMS)
	cargo run -q -p margay-tests --bin margay-cluster -- image --name margay.io/margay:v0.1.0 --out target/margay.tar \
	  target/x86_64-unknown-linux-gnu/debug/margay=margay target/x86_64-unknown-linux-gnu/debug/margay-cni=margay-cni -- /margay

# A real Kubernetes on this machine, its nodes NotReady; `. target/cluster/env` to use it.
cluster:
	$(CLUSTER) up --nodes $(NODES) --state $(STATE)

cluster-down:
	$(CLUSTER) down --state $(STATE)
