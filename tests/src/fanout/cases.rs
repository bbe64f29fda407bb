//! The measurements: each starts its processes, takes figures, and ends them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::clock::{now_ns, until};
use super::control::{BenchProcess, count, number};
use super::figures::{FanoutSheet, Series};
use super::identity::Identities;
use super::stats::Usage;

/// Nodes that decode everything where all hear of every event.
const PROBES: usize = 8;
/// Time from an order to the first event.
const LEAD: Duration = Duration::from_millis(300);
/// Time in which the last event of a window must arrive, or the server counts as overrun.
const DRAINED: Duration = Duration::from_secs(20);
/// Time in which a server that is sent SIGTERM must end.
const ENDED: Duration = Duration::from_secs(60);
/// Certificates beyond those of the nodes, for hostile peers.
const SPARE: usize = 1000;
/// Hostile peers: manner and number.
const HOSTILE: [(&str, usize); 5] = [
    ("stalled", 20),
    ("zero-window", 20),
    ("slowloris", 200),
    ("half-open", 1000),
    ("malformed", 50),
];

/// What to measure, and where.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Smaller models and shorter windows, for development: under two minutes.
    #[arg(long)]
    quick: bool,
    /// Only cases whose name contains one of these: load, selector, all, views, kill, roll,
    /// hostile, rebroadcast.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Without the baseline.
    #[arg(long)]
    no_baseline: bool,
    /// Seconds of a window.
    #[arg(long)]
    seconds: Option<u64>,
    /// Windows per case; the median counts.
    #[arg(long)]
    windows: Option<usize>,
    /// Folder of certificates and sockets.
    #[arg(long, default_value = "target/bench-typha")]
    state: PathBuf,
    /// Where the table and the values go, without `.md` and `.json`.
    #[arg(long, default_value = "target/bench-typha-report")]
    report: PathBuf,
}

/// A case of events at a fixed rate.
#[derive(Debug, Clone, Copy)]
struct StreamCase {
    name: &'static str,
    clients: usize,
    rate: u64,
    pods: usize,
    everything: bool,
}

const fn stream(name: &'static str, clients: usize, rate: u64, pods: usize) -> StreamCase {
    let everything = name.as_bytes()[0] == b'a';
    StreamCase {
        name,
        clients,
        rate,
        pods,
        everything,
    }
}

/// Cases in full.
const FULL: [StreamCase; 6] = [
    stream("all.400x1000", 400, 1000, 100_000),
    stream("all.400x100", 400, 100, 100_000),
    stream("all.1000x100", 1000, 100, 10_000),
    stream("all.64x100", 64, 100, 10_000),
    stream("views.400x1000", 400, 1000, 100_000),
    stream("views.1000x100", 1000, 100, 100_000),
];
/// Cases of a quick run, which take the lines of the full ones.
const QUICK: [StreamCase; 4] = [
    stream("all.400x1000", 400, 1000, 10_000),
    stream("all.400x100", 400, 100, 10_000),
    stream("views.400x1000", 400, 1000, 10_000),
    stream("views.64x100", 64, 100, 10_000),
];

/// Takes all figures, prints the table and writes it with the values.
pub fn run(args: Args) -> Result<()> {
    let mut bench = FanoutBench::new(args)?;
    bench.run()?;
    let (mut text, values) = (bench.sheet.markdown(), bench.sheet.json());
    if bench.args.quick {
        text.push_str(
            "\nQuick: 10k pods instead of 100k, 200 nodes instead of 1000, short windows.\n",
        );
    }
    println!("\n{text}");
    std::fs::write(bench.args.report.with_extension("md"), &text)?;
    let about = json!({"quick": bench.args.quick, "lines": values});
    std::fs::write(
        bench.args.report.with_extension("json"),
        serde_json::to_string_pretty(&about)?,
    )?;
    Ok(())
}

struct FanoutBench {
    args: Args,
    identities: Identities,
    sheet: FanoutSheet,
    sockets: usize,
}

/// A server and where it is reached.
struct BenchServer {
    worker: BenchProcess,
    port: u64,
    socket: PathBuf,
}

/// Processes of one case.
struct CaseSetup {
    server: BenchServer,
    source: BenchProcess,
    clients: BenchProcess,
    /// Number of events so far.
    events: u64,
    rebroadcast: bool,
}

/// What a window showed.
#[derive(Debug, Clone, Copy)]
struct EventWindow {
    events: u64,
    cpu_s: f64,
    p50: f64,
    p99: f64,
    frames: f64,
    late_ms: f64,
    /// Nodes did not get the last event in time.
    overrun: bool,
}

impl FanoutBench {
    fn new(args: Args) -> Result<Self> {
        let most = if args.quick { 400 } else { 1000 };
        std::fs::create_dir_all(&args.state)?;
        let identities = Identities::create(args.state.join("tls"), most + SPARE)?;
        Ok(Self {
            args,
            identities,
            sheet: FanoutSheet::default(),
            sockets: 0,
        })
    }

    fn wants(&self, name: &str) -> bool {
        self.args.only.is_empty()
            || self
                .args
                .only
                .iter()
                .any(|only| name.contains(only.as_str()))
    }

    fn run(&mut self) -> Result<()> {
        let streams: &[StreamCase] = if self.args.quick { &QUICK } else { &FULL };
        if self.wants("load") || self.wants("selector") {
            self.load().context("load")?;
        }
        for case in streams {
            let is_wanted = self.wants(case.name);
            // Its nodes hear of everything, whatever concerns them.
            if case.everything && !self.args.no_baseline && (is_wanted || self.wants("rebroadcast"))
            {
                self.stream(*case, Series::Rebroadcast)
                    .with_context(|| format!("{} of the baseline", case.name))?;
            }
            if is_wanted {
                self.stream(*case, Series::Margay).context(case.name)?;
            }
        }
        if self.wants("kill") {
            self.kill().context("kill")?;
        }
        if self.wants("roll") {
            self.roll().context("roll")?;
        }
        if self.wants("hostile") {
            self.hostile().context("hostile")?;
        }
        Ok(())
    }

    fn put(&mut self, series: Series, key: &str, value: f64) -> Result<()> {
        println!("{key:28} {value:12.3}   {series:?}");
        self.sheet.put(series, key, value)
    }

    fn start_server(&mut self, rebroadcast: bool) -> Result<BenchServer> {
        self.sockets += 1;
        let socket = self
            .args
            .state
            .join(format!("source-{}.sock", self.sockets));
        let mode = if rebroadcast { "rebroadcast" } else { "margay" };
        let mut worker = BenchProcess::start(&words(&[
            "server",
            "--tls",
            text(self.identities.folder())?,
            "--source",
            text(&socket)?,
            "--mode",
            mode,
        ]))?;
        let port = count(&worker.answer()?, "port")?;
        Ok(BenchServer {
            worker,
            port,
            socket,
        })
    }

    fn start_source(&self, pods: usize, clients: usize, everything: bool) -> Result<BenchProcess> {
        let (pods, clients) = (pods.to_string(), clients.to_string());
        let mut args = words(&["source", "--pods", &pods, "--nodes", &clients]);
        args.extend(everything.then(|| "--everything".to_owned()));
        BenchProcess::start(&args)
    }

    fn start_clients(&self, clients: usize, probes: usize, more: &[&str]) -> Result<BenchProcess> {
        let (clients, probes) = (clients.to_string(), probes.to_string());
        let tls = text(self.identities.folder())?;
        let mut args = words(&[
            "clients", "--tls", tls, "--count", &clients, "--probes", &probes,
        ]);
        args.extend(words(more));
        BenchProcess::start(&args)
    }

    /// Load, and a selector of all that is added later.
    fn load(&mut self) -> Result<()> {
        let pods = if self.args.quick { 10_000 } else { 100_000 };
        let mut server = self.start_server(false)?;
        let mut source = self.start_source(pods, 20, false)?;
        let before = server.worker.usage()?;
        attach(&mut source, &mut server)?;
        std::thread::sleep(Duration::from_secs(1));
        let loaded = server.worker.usage()?;
        self.put(Series::Margay, "load.cpu", loaded.cpu_s - before.cpu_s)?;
        self.put(Series::Margay, "load.rss", loaded.rss as f64 / 1e6)?;
        println!("{:28} {:12.1}   peak, MB", "", loaded.peak as f64 / 1e6);
        let mut clients = self.start_clients(1, 1, &[])?;
        connect(&mut clients, &[server.port])?;
        for policy in ["first", "second", "third"] {
            let (before, frames) = (server.worker.usage()?, frames(&mut clients)?);
            let written = count(&source.ask(&json!({"policy": policy}))?, "written_ns")?;
            while self::frames(&mut clients)? == frames {
                std::thread::sleep(Duration::from_micros(500));
            }
            let seen = now_ns() - written;
            std::thread::sleep(Duration::from_millis(300));
            let after = server.worker.usage()?;
            self.put(
                Series::Margay,
                "selector.cpu",
                (after.cpu_s - before.cpu_s) * 1e3,
            )?;
            self.put(Series::Margay, "selector.seen", seen as f64 / 1e6)?;
        }
        Ok(())
    }

    fn setup(&mut self, case: StreamCase, series: Series) -> Result<CaseSetup> {
        let rebroadcast = series == Series::Rebroadcast;
        let mut server = self.start_server(rebroadcast)?;
        let mut source = self.start_source(case.pods, case.clients, case.everything)?;
        attach(&mut source, &mut server)?;
        let probes = if case.everything {
            PROBES
        } else {
            case.clients
        };
        let more: &[&str] = if rebroadcast { &["--rebroadcast"] } else { &[] };
        let clients = self.start_clients(case.clients, probes, more)?;
        Ok(CaseSetup {
            server,
            source,
            clients,
            events: 0,
            rebroadcast,
        })
    }

    /// Snapshot to all nodes, and then windows of events.
    fn stream(&mut self, case: StreamCase, series: Series) -> Result<()> {
        println!("-- {} of {series:?}: {} pods", case.name, case.pods);
        let mut setup = self.setup(case, series)?;
        std::thread::sleep(Duration::from_millis(500));
        let before = setup.server.worker.usage()?;
        let started = connect_only(&mut setup.clients, &[setup.server.port])?;
        let synced = setup.clients.ask(&json!({"synced": true}))?;
        std::thread::sleep(Duration::from_millis(500));
        let after = setup.server.worker.usage()?;
        let per_node = after.rss.saturating_sub(before.rss) as f64 / case.clients as f64 / 1e6;
        let mode = if case.everything { "all" } else { "views" };
        println!("{:28} {per_node:12.3}   MB per node, {mode}", "");
        if case.pods == 100_000 || self.args.quick {
            self.put(series, &format!("{mode}.rss"), per_node)?;
        }
        if case.name == "all.400x1000" {
            self.put(
                series,
                "snapshot.s",
                (number(&synced, "last_ns")? - started) / 1e9,
            )?;
            self.put(series, "snapshot.cpu", after.cpu_s - before.cpu_s)?;
            self.put(series, "snapshot.bytes", number(&synced, "bytes")? / 1e3)?;
        }
        let seconds = self
            .args
            .seconds
            .unwrap_or(if self.args.quick { 3 } else { 10 });
        setup.window(case, 1)?;
        let windows = self
            .args
            .windows
            .unwrap_or(if self.args.quick { 2 } else { 3 });
        for _ in 0..windows {
            let window = setup.window(case, seconds)?;
            let per = if case.everything {
                window.events as f64 * case.clients as f64
            } else {
                window.events as f64
            };
            println!(
                "{:28} {:12.1}   frames per event, source late {:.1} ms, {:.2} CPUs",
                "",
                window.frames / window.events as f64,
                window.late_ms,
                window.cpu_s / seconds as f64,
            );
            self.put(
                series,
                &format!("{}.cpu", case.name),
                window.cpu_s * 1e6 / per,
            )?;
            self.put(series, &format!("{}.p50", case.name), window.p50)?;
            self.put(series, &format!("{}.p99", case.name), window.p99)?;
            if window.overrun {
                println!(
                    "{:28}   overrun: nodes lack the last event after {DRAINED:?}",
                    ""
                );
                break;
            }
        }
        Ok(())
    }

    /// Clients of the cases in which servers end.
    const fn many(&self) -> usize {
        if self.args.quick { 200 } else { 1000 }
    }

    /// One of two servers is killed, and its nodes come to the other.
    fn kill(&mut self) -> Result<()> {
        let clients = self.many();
        let (mut first, mut second) = (self.start_server(false)?, self.start_server(false)?);
        let mut source = self.start_source(clients * 20, clients, false)?;
        attach(&mut source, &mut first)?;
        attach(&mut source, &mut second)?;
        let mut nodes = self.start_clients(clients, clients, &["--hold"])?;
        connect(&mut nodes, &[first.port])?;
        nodes.ask(&json!({"ports": [second.port]}))?;
        let (before, killed) = (second.worker.usage()?, now_ns());
        first.worker.signal(Signal::SIGKILL)?;
        let synced = nodes.ask(&json!({"synced": true, "since_ns": killed}))?;
        let after = second.worker.usage()?;
        self.put(
            Series::Margay,
            "kill.s",
            (number(&synced, "last_ns")? - killed as f64) / 1e9,
        )?;
        self.put(Series::Margay, "kill.bytes", number(&synced, "bytes")?)?;
        self.put(Series::Margay, "kill.cpu", after.cpu_s - before.cpu_s)
    }

    /// Two servers are replaced one after the other, each by one that starts first.
    fn roll(&mut self) -> Result<()> {
        let clients = self.many();
        let mut servers = vec![self.start_server(false)?, self.start_server(false)?];
        let mut source = self.start_source(clients * 20, clients, false)?;
        for server in &mut servers {
            attach(&mut source, server)?;
        }
        let mut nodes = self.start_clients(clients, clients, &["--hold"])?;
        connect(&mut nodes, &[servers[0].port, servers[1].port])?;
        let started = now_ns();
        let mut synced = Value::Null;
        for _ in 0..2 {
            let mut fresh = self.start_server(false)?;
            attach(&mut source, &mut fresh)?;
            let old = servers.remove(0);
            servers.push(fresh);
            let ports: Vec<u64> = servers.iter().map(|server| server.port).collect();
            nodes.ask(&json!({"ports": ports}))?;
            old.worker.signal(Signal::SIGTERM)?;
            // It ends once its last node has gone.
            let deadline = now_ns() + u64::try_from(ENDED.as_nanos())?;
            while Usage::of(old.worker.pid()).is_ok_and(|usage| usage.rss > 0) {
                ensure!(
                    now_ns() < deadline,
                    "a server does not end within {ENDED:?}"
                );
                std::thread::sleep(Duration::from_millis(20));
            }
            // Until its nodes have noticed.
            std::thread::sleep(Duration::from_millis(200));
            synced = nodes.ask(&json!({"synced": true}))?;
        }
        self.put(
            Series::Margay,
            "roll.s",
            (number(&synced, "last_ns")? - started as f64) / 1e9,
        )?;
        self.put(Series::Margay, "roll.bytes", number(&synced, "bytes")?)
    }

    /// Latency of well-behaved nodes beside peers that are not.
    fn hostile(&mut self) -> Result<()> {
        let clients = 100;
        let case = StreamCase {
            name: "all",
            clients,
            rate: 100,
            pods: 10_000,
            everything: true,
        };
        let seconds = self
            .args
            .seconds
            .unwrap_or(if self.args.quick { 2 } else { 10 });
        for (manner, peers) in HOSTILE {
            let mut setup = self.setup(case, Series::Margay)?;
            connect(&mut setup.clients, &[setup.server.port])?;
            setup.window(case, 1)?;
            let alone = setup.window(case, seconds)?;
            let before = setup.server.worker.usage()?;
            let (port, peers_text) = (setup.server.port.to_string(), peers.to_string());
            let first = if self.args.quick { "400" } else { "1000" };
            let tls = text(self.identities.folder())?;
            let mut hostile = BenchProcess::start(&words(&[
                "hostile",
                "--tls",
                tls,
                "--port",
                &port,
                "--manner",
                manner,
                "--count",
                &peers_text,
                "--first",
                first,
            ]))?;
            hostile.answer()?;
            let beside = setup.window(case, seconds)?;
            let after = setup.server.worker.usage()?;
            let grown = after.rss.saturating_sub(before.rss) as f64 / peers as f64 / 1e6;
            println!(
                "{manner:28} p99 {:.1} ms alone, {:.1} ms beside",
                alone.p99, beside.p99
            );
            self.put(
                Series::Margay,
                &format!("hostile.{manner}.p99"),
                beside.p99 / alone.p99,
            )?;
            self.put(Series::Margay, &format!("hostile.{manner}.rss"), grown)?;
        }
        Ok(())
    }
}

impl CaseSetup {
    /// Events at a fixed rate for that long, and until all nodes that measure have the last.
    fn window(&mut self, case: StreamCase, seconds: u64) -> Result<EventWindow> {
        let events = case.rate * seconds;
        let start_ns = now_ns() + u64::try_from(LEAD.as_nanos())?;
        self.clients
            .ask(&json!({"first": self.events, "start_ns": start_ns, "rate": case.rate}))?;
        let before = self.server.worker.usage()?;
        self.source
            .order(&json!({"start_ns": start_ns, "rate": case.rate, "count": events}))?;
        let late_ms = number(&self.source.answer()?, "late_ms")?;
        self.events += events;
        let end_ns = start_ns + seconds * 1_000_000_000;
        std::thread::sleep(until(end_ns + 200_000_000));
        // A server that is behind sends until nodes have the last event; one that falls behind for
        // good is given up.
        let deadline = now_ns() + u64::try_from(DRAINED.as_nanos())?;
        let hears_all = case.everything || self.rebroadcast;
        let mut overrun = false;
        while hears_all && !overrun {
            let progress = self.clients.ask(&json!({"progress": true}))?;
            if count(&progress, "slowest_probe")? >= self.events {
                break;
            }
            overrun = now_ns() > deadline;
            std::thread::sleep(Duration::from_millis(20));
        }
        let after = self.server.worker.usage()?;
        let report = self.clients.ask(&json!({"report": true}))?;
        ensure!(
            count(&report, "synced")? == case.clients as u64,
            "nodes have lost their streams: {report}"
        );
        let (p50, p99) = (number(&report, "p50_ms")?, number(&report, "p99_ms")?);
        Ok(EventWindow {
            events,
            cpu_s: after.cpu_s - before.cpu_s,
            p50,
            p99,
            frames: number(&report, "frames")?,
            late_ms,
            overrun,
        })
    }
}

/// Writes the lists to a server and waits until it is in sync.
fn attach(source: &mut BenchProcess, server: &mut BenchServer) -> Result<()> {
    source.ask(&json!({"attach": server.socket}))?;
    server.worker.answer()?;
    Ok(())
}

/// Lets nodes connect, and returns the time at which they began.
fn connect_only(clients: &mut BenchProcess, ports: &[u64]) -> Result<f64> {
    number(&clients.ask(&json!({"ports": ports}))?, "at_ns")
}

/// Lets nodes connect, and waits until all are in sync.
fn connect(clients: &mut BenchProcess, ports: &[u64]) -> Result<()> {
    connect_only(clients, ports)?;
    clients.ask(&json!({"synced": true}))?;
    Ok(())
}

fn frames(clients: &mut BenchProcess) -> Result<u64> {
    count(&clients.ask(&json!({"report": true}))?, "frames")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
