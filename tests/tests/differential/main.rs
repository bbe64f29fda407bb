//! Differential test with four independent verdicts on a packet: from the objects themselves, from
//! `calc::evaluate` on the records that the graph makes of them, from the compiled table as a
//! value, and from the kernel that the table is loaded into.
//!
//! Every case goes through its text, so that one that fails can be kept: as a file in
//! `tests/data/corpus`, where it is tried again each time. `make fuzz SECONDS=600` goes on with
//! other seeds and writes what it finds there.

mod case;
mod kernel;
#[path = "../../../calc/tests/suite/naive.rs"]
mod naive;
#[path = "../../../calc/tests/suite/reference/mod.rs"]
mod reference;
mod text;
#[path = "../../../calc/tests/suite/world/mod.rs"]
mod world;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use margay_api::endpoint::{EndpointKey, interface_name};
use margay_api::rule::{Action, Protocol};
use margay_api::settings::{FelixOverrides, SettingsScope};
use margay_calc::evaluate::{self, Direction, evaluate};
use margay_calc::graph::Graph;
use margay_calc::model::{Record, RecordId};
use margay_calc::text as records_text;
use margay_calc::update::Update;
use margay_dataplane::Attached;
use margay_dataplane::Dirty;
use margay_dataplane::nftables::{Compiler, simulate};
use margay_nft::{CtState, Hook, IfName, Ruleset};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use case::{Case, LOCAL, NODE, Probe, addresses, local, pod};
use kernel::Kernel;
use naive::Naive;
use reference::Objects;

/// Seeds that are tried each time.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
/// Cases of each seed.
const CASES: u32 = 24;

type Records = BTreeMap<RecordId, Record>;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/corpus")
}

/// All verdicts on every packet of the case.
fn check_case(kernel: &mut Kernel, text: &str) -> Result<Tally> {
    let case: Case = text.parse()?;
    let (mut graph, mut objects) = (Graph::default(), Objects::default());
    // The kernel does not know most answers and errors of ICMP as belonging to anything, and policy
    // is to be asked about them nevertheless.
    let settings = FelixOverrides {
        allow_conntrack_invalid: Some(true),
        ..FelixOverrides::none(SettingsScope::Cluster)
    };
    let settings = Update::Settings("default".to_owned(), Some(settings));
    for update in case.updates.into_iter().chain([settings]) {
        graph.apply(update.clone());
        objects.apply(update);
    }
    graph.flush();
    let view = graph.view(NODE);
    let records: Records = view
        .ids()
        .filter_map(|id| Some((id.clone().into_owned(), view.record(&id)?.into_owned())))
        .collect();
    let of_node = objects
        .compute()
        .into_iter()
        .filter(|(_, (_, audience))| audience.contains(NODE));
    let wanted: Records = of_node.map(|(id, (record, _))| (id, record)).collect();
    ensure!(
        records == wanted,
        "the graph has made of the objects: {records:#?}\nand a plain computation: {wanted:#?}"
    );
    let ruleset = compile(&records);
    ensure!(ruleset.check() == Ok(()), "{:?}", ruleset.check());
    kernel.load(&ruleset)?;
    let probes = of_new_connections(&case.probes);
    let came = kernel.pass(&probes)?;
    let mut tally = Tally::default();
    for (number, probe) in probes.iter().enumerate() {
        let by_records = decided(&objects, &graph, probe)?;
        let by_table = simulated(&ruleset, probe)?;
        let by_kernel = came.contains(&number);
        if by_records != by_table || by_table != by_kernel {
            let dump: String = records
                .iter()
                .map(|(id, record)| records_text::record(id, record))
                .collect();
            bail!(
                "{probe:?}: allowed by the objects and the evaluator: {by_records}, by the table: \
                 {by_table}, by the kernel: {by_kernel}\n\
                 {dump}\n\
                 {ruleset}"
            );
        }
        tally.allowed += usize::from(by_kernel);
        tally.denied += usize::from(!by_kernel);
    }
    Ok(tally)
}

/// Number of packets by verdict.
#[derive(Debug, Default)]
struct Tally {
    allowed: usize,
    denied: usize,
}

/// Packets that are no answer to another one: the first of each pair of ends.
fn of_new_connections(probes: &[Probe]) -> Vec<Probe> {
    let mut seen = BTreeSet::new();
    let ends = |probe: &Probe| {
        let ports = if Protocol(probe.protocol).has_ports() {
            probe.ports
        } else {
            (0, 0)
        };
        let mut ends = [(probe.source, ports.0), (probe.destination, ports.1)];
        ends.sort();
        // An echo is known by its type too, and its answer by another.
        (
            probe.protocol,
            ends,
            if [1, 58].contains(&probe.protocol) {
                probe.icmp
            } else {
                (0, 0)
            },
        )
    };
    probes
        .iter()
        .filter(|probe| seen.insert(ends(probe)))
        .copied()
        .collect()
}

fn compile(records: &Records) -> Ruleset {
    let mut compiler = Compiler::new(NODE);
    compiler.apply(
        records,
        &Dirty {
            records: records.keys().cloned().collect(),
            members: BTreeMap::new(),
        },
    );
    for name in LOCAL {
        let key = pod(name);
        let attached = Attached {
            addresses: addresses(&key).to_vec(),
            uid: String::new(),
            endpoint: key.clone(),
            host_ports: Vec::new(),
        };
        compiler.attach(interface_name(&key), attached, records);
    }
    compiler.ruleset(records)
}

/// The verdict of the objects, which must be that of the evaluator.
fn decided(objects: &Objects, graph: &Graph, probe: &Probe) -> Result<bool> {
    let packet = evaluate::Packet {
        source: probe.source,
        destination: probe.destination,
        protocol: Protocol(probe.protocol),
        source_port: probe.ports.0,
        destination_port: probe.ports.1,
        icmp: probe.icmp,
    };
    let evaluate_objects = |key: &EndpointKey, direction: Direction| -> Result<bool> {
        let naive = Naive(objects).verdict(key, direction, &packet);
        let verdict = evaluate(graph, key, direction, &packet);
        let trace = || records_text::verdict(&verdict);
        ensure!(
            naive == verdict.action,
            "{key} {direction:?} {probe:?}: {naive:?} by the objects, but\n{}",
            trace()
        );
        let of_node = evaluate(&graph.view(NODE), key, direction, &packet);
        let is_local = LOCAL.iter().any(|name| pod(name) == *key);
        ensure!(
            !is_local || of_node == verdict,
            "{key} {direction:?} {probe:?}: {of_node:?} in the view, but\n{}",
            trace()
        );
        Ok(verdict.action == Action::Allow)
    };
    let mut allowed = true;
    for (address, direction) in [
        (probe.source, Direction::Egress),
        (probe.destination, Direction::Ingress),
    ] {
        for key in objects.endpoints.keys() {
            // Everybody's verdict is compared; that of the node's own pods counts.
            let verdict = evaluate_objects(key, direction)?;
            allowed &= verdict || local(address).is_none_or(|index| pod(LOCAL[index]) != *key);
        }
        let unknown =
            local(address).is_some_and(|index| !objects.endpoints.contains_key(&pod(LOCAL[index])));
        allowed &= !unknown;
    }
    Ok(allowed)
}

fn simulated(ruleset: &Ruleset, probe: &Probe) -> Result<bool> {
    let interface = |address| {
        let name = local(address).map_or("eth0".to_owned(), |index| {
            interface_name(&pod(LOCAL[index]))
        });
        IfName::new(&name).context("a name of an interface")
    };
    let protocol = Protocol(probe.protocol);
    let packet = simulate::Packet {
        input: Some(interface(probe.source)?),
        output: Some(interface(probe.destination)?),
        source: probe.source,
        destination: probe.destination,
        protocol: probe.protocol,
        ports: protocol.has_ports().then_some(probe.ports),
        icmp: [Protocol::ICMP, Protocol::ICMPV6]
            .contains(&protocol)
            .then_some(probe.icmp),
        state: CtState::NEW,
        from_host: false,
        mark: 0,
        translated: false,
    };
    let arriving = simulate::Packet {
        output: None,
        ..packet.clone()
    };
    Ok(simulate::run(ruleset, Hook::Prerouting, &arriving).passed
        && simulate::run(ruleset, Hook::Forward, &packet).passed)
}

/// Cases of one seed; a failing one is made smaller and comes back as text, with the reason.
fn hunt(
    kernel: &RefCell<Kernel>,
    seed: u64,
    cases: u32,
) -> std::result::Result<Tally, (String, String)> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases,
        max_shrink_iters: 4000,
        failure_persistence: None,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let sum = RefCell::new(Tally::default());
    let result = runner.run(&case::case(), |case| {
        let tally = check_case(&mut kernel.borrow_mut(), &case.to_string());
        let tally = tally.map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let mut sum = sum.borrow_mut();
        (sum.allowed, sum.denied) = (sum.allowed + tally.allowed, sum.denied + tally.denied);
        Ok(())
    });
    match result {
        Ok(()) => Ok(sum.into_inner()),
        Err(TestError::Fail(reason, case)) => Err((case.to_string(), reason.to_string())),
        Err(TestError::Abort(reason)) => Err((String::new(), reason.to_string())),
    }
}

#[test]
fn everybody_agrees_on_random_policies_and_packets() -> Result<()> {
    let kernel = RefCell::new(Kernel::new()?);
    let mut sum = Tally::default();
    for seed in SEEDS {
        let found = hunt(&kernel, seed, CASES);
        let tally =
            found.map_err(|(case, reason)| anyhow::anyhow!("seed {seed}: {reason}\n{case}"))?;
        (sum.allowed, sum.denied) = (sum.allowed + tally.allowed, sum.denied + tally.denied);
    }
    // If everything is denied, or everything is allowed, agreement shows nothing.
    ensure!(sum.allowed > 500 && sum.denied > 500, "{sum:?}");
    Ok(())
}

#[test]
fn everybody_agrees_on_what_was_found_before() -> Result<()> {
    let mut kernel = Kernel::new()?;
    let mut tried = 0;
    for entry in fs::read_dir(corpus())? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        check_case(&mut kernel, &text).with_context(|| path.display().to_string())?;
        tried += 1;
    }
    ensure!(tried > 0, "no case in {}", corpus().display());
    Ok(())
}

/// With FUZZ_SECONDS it goes on for that long from FUZZ_SEED, and writes what it finds into the
/// corpus; without, it tries one case.
#[test]
fn going_on_with_other_seeds() -> Result<()> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>())
            .transpose()
    };
    let (seconds, seed) = (
        number("FUZZ_SECONDS")?,
        number("FUZZ_SEED")?.unwrap_or(1_000_000),
    );
    let kernel = RefCell::new(Kernel::new()?);
    let end = Instant::now() + Duration::from_secs(seconds.unwrap_or_default());
    let mut tried: u64 = 0;
    loop {
        if let Err((case, reason)) = hunt(
            &kernel,
            seed + tried,
            if seconds.is_some() { CASES } else { 1 },
        ) {
            let path = corpus().join(format!("seed-{}.txt", seed + tried));
            if seconds.is_some() {
                fs::write(&path, &case)?;
            }
            bail!(
                "seed {}, kept as {}: {reason}\n{case}",
                seed + tried,
                path.display()
            );
        }
        tried += 1;
        if Instant::now() >= end {
            println!("{tried} seeds of {CASES} cases each");
            return Ok(());
        }
    }
}

#[test]
fn a_case_is_its_text() -> Result<()> {
    use proptest::strategy::{Strategy, ValueTree};
    let mut runner = TestRunner::new_with_rng(
        Config::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]),
    );
    for _ in 0..200 {
        let case = case::case()
            .new_tree(&mut runner)
            .map_err(|reason| anyhow::anyhow!("{reason}"))?
            .current();
        // A selector of a random tree may have parentheses that the parser does without.
        let read: Case = case.to_string().parse()?;
        let again: Case = read.to_string().parse()?;
        ensure!(again == read, "{read}\n{again}");
        ensure!(
            read.probes == case.probes && read.updates.len() == case.updates.len(),
            "{case}\n{read}"
        );
    }
    Ok(())
}
