# Names for commands, and nothing more.

NODES ?= 3
SECONDS ?= 60
STATE ?= target/cluster
# One selection of packages and targets for everything: another one would compile the big
# dependencies once more, with other features.
BUILD = cargo build --workspace --bins --tests
BIN = target/*/debug
# The programs that are shipped and measured.
RELEASE = cargo build --workspace --release --bin margay --bin margay-cni
RELEASED = target/*/release
OURS = --exclude margay-tests
# Modules and suites whose tests create network namespaces, which needs root.
AS_ROOT = cni::service::tests probe::tests conntrack::tests worker::tests tests::diff tests::drift tests::kernel tests::packets
KERNEL = bgp bgp_node cni conformance connections differential enforcement host host_ports lab routing \
  spoof

.PHONY: check check-kernel test kubernetes deny bless demo bench bench-typha conformance e2e-netpol image cluster cluster-down fuzz fuzz-targets kernels simulate \
  docs sbom

# Format, lints, documentation, unused dependencies, and every test that needs neither root nor a
# cluster.
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
	$$(.ci/tool cargo-machete 0.9.2) --skip-target-dir
	cargo test --workspace $(OURS) -- $(AS_ROOT:%=--skip %)
	cargo test --workspace --test architecture --test pages --test simulation

# Tests that `make check` leaves out but that need no cluster: rulesets, routes and packets in
# namespaces on this kernel. Needs root.
check-kernel:
	$(BUILD)
	$(BIN)/margay-cluster prepare
	cargo test --workspace $(OURS) -- $(AS_ROOT)
	cargo test --workspace $(KERNEL:%=--test %)

# Everything, including the kernel in namespaces and a real Kubernetes of three nodes. Needs root.
test:
	$(BUILD)
	$(BIN)/margay-cluster prepare
	cargo test --workspace --no-fail-fast

# The programs of a cluster, built from their Go modules into the user's cache, once.
kubernetes:
	$(BUILD)
	$(BIN)/margay-cluster build

# The kernel layers on kernels of distributions, in virtual machines that need no KVM: ONLY=6.1
# selects kernels, SUITES=cni,host suites, QUICK=1 the suites that depend most on the kernel;
# REFRESH=1 looks for newer kernels than the cached ones. Needs root, and network once.
kernels:
	$(BUILD)
	$(BIN)/margay-kernels $(if $(ONLY),--only $(ONLY)) $(if $(SUITES),--suites $(SUITES)) $(if $(QUICK),--quick) $(if $(REFRESH),--refresh)

# Licences, bans and sources of every dependency.
deny:
	.ci/deny

# Rewrites golden texts and generated files; look at the diff.
bless:
	UPDATE_EXPECT=1 cargo test --workspace $(OURS)
	UPDATE_EXPECT=1 cargo test --workspace --test pages

# The book as HTML in target/docs.
docs:
	$$(.ci/tool mdbook 0.5.4 --no-default-features --features search) build docs

# The image's bill of materials, as CycloneDX.
sbom:
	mkdir -p target
	$$(.ci/tool cargo-sbom 0.10.0) --cargo-package margay --output-format cyclone_dx_json_1_6 > target/sbom.json

# The whole path with a running commentary. KEEP=1 leaves the cluster up. Needs root.
demo:
	$(BUILD)
	$(BIN)/margay-demo $(if $(KEEP),--keep)

# Benchmarks of the release build, on a real cluster and without one, with their anchors; ONLY=name
# selects some. Needs root, and an idle machine.
bench:
	$(RELEASE) --bin margay-bench --bin margay-probe --bin margay-pause --bin margay-shim
	$(RELEASED)/margay-bench $(if $(ONLY),--only $(ONLY))

# Cost and latency of typha's fan-out, with server, source and nodes as processes, beside Calico's
# Typha: QUICK=1 takes small models in two minutes, ONLY=views,kill some cases. Times need a quiet
# machine; CPU is what compares.
bench-typha:
	$(RELEASE) --bin margay-bench-typha
	$(RELEASED)/margay-bench-typha run $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

# Tables of verdicts with real packets: CASES is the table, ON=kernel (namespaces) or cluster (a
# real Kubernetes), ONLY=1,5 selects cases, ENFORCE=off|deny shows that the table can fail. Needs
# root.
conformance:
	$(BUILD)
	$(BIN)/margay-conformance --on $(or $(ON),kernel) $(if $(CASES),--cases $(CASES)) $(if $(ONLY),--only $(ONLY)) $(if $(ENFORCE),--enforce $(ENFORCE))

# The NetworkPolicy cases of Kubernetes' own end-to-end suite, unmodified; the JUnit report stays in
# target/e2e-report. Builds the suite the first time (8 minutes); takes about 9 minutes. Needs root.
e2e-netpol:
	$(BUILD)
	$(BIN)/margay-e2e

# The image of every component as an OCI archive.
image:
	$(RELEASE)
	$(BUILD)
	$(BIN)/margay-cluster image --name margay.io/margay:v0.1.0 --out target/margay.tar \
	  $$(echo $(RELEASED)/margay)=margay $$(echo $(RELEASED)/margay-cni)=margay-cni \
	  LICENSE=licenses/LICENSE deploy/licenses.txt=licenses/dependencies.txt -- /margay

# A real Kubernetes on this machine, its nodes NotReady; `. target/cluster/env` to use it.
cluster:
	$(BUILD)
	$(BIN)/margay-cluster up --nodes $(NODES) --state $(STATE)

cluster-down:
	$(BIN)/margay-cluster down --state $(STATE)

# Random policies and packets with verdicts from four sources, from a new seed; findings become
# cases in tests/data/corpus. Needs root.
fuzz:
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$$(date +%s) cargo test --workspace --test differential going_on -- --nocapture

# Typha, agents and IPAM in one thread and virtual time, under random faults: SEED=7 replays a seed
# with a trace; without it, new seeds are tried for SECONDS. STEPS is the length of a schedule. What
# fails is printed as a line for tests/data/simulation.json.
simulate:
	$(if $(SEED),SIMULATE_SEED=$(SEED),SIMULATE_SECONDS=$(SECONDS)) SIMULATE_STEPS=$(STEPS) \
	  cargo test --workspace --test simulation every_schedule_holds -- --nocapture

# Every parser of outside input, driven by libFuzzer for SECONDS each; findings become seeds in
# tests/data/fuzz. TARGETS selects some.
fuzz-targets:
	SECONDS_EACH=$(SECONDS) $(if $(TARGETS),TARGETS="$(TARGETS)") .ci/fuzz
