//! Cases as text, one object or packet a line, so that failing cases are kept as data.
//!
//! ```text
//! namespace red team=a
//! pod red/p0 n1 10.0.0.1,fd00::1 sa:robot port:http:6:80 app=web
//! policy NetworkPolicy red/a default 10 in,out app~==~"web"
//!   in allow proto=6 from.sel=app~==~"db" to.port=80-81,http
//! packet 10.0.0.1 10.0.0.2 6 53 80 8/0
//! ```
//!
//! In a selector `~` stands for a space. A minus before an object: it is gone.

use std::fmt::{self, Display, Write};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use margay_api::endpoint::{NamedPort, WorkloadEndpoint, interface_name};
use margay_api::meta::{Labels, NamespacedName};
use margay_api::network::NetworkSet;
use margay_api::policy::{Order, Policy, PolicyKey, PolicyKind, Tier, Traffic};
use margay_api::rule::{Action, EntityMatch, Icmp, IpVersion, Port, PortRange, Protocol, Rule};
use margay_api::selector::Selector;
use margay_calc::update::{Backend, Update};

use crate::case::{Case, Probe, pod};

impl Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for update in &self.updates {
            write_update(f, update)?;
        }
        for Probe {
            source,
            destination,
            protocol,
            ports,
            icmp,
        } in &self.probes
        {
            let ((from, to), (kind, code)) = (ports, icmp);
            writeln!(
                f,
                "packet {source} {destination} {protocol} {from} {to} {kind}/{code}"
            )?;
        }
        Ok(())
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut case = Self {
            updates: Vec::new(),
            probes: Vec::new(),
        };
        for line in text
            .lines()
            .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        {
            parse_line(&mut case, line).with_context(|| format!("in {line:?}"))?;
        }
        Ok(case)
    }
}

// ---- objects ----

fn write_update(f: &mut fmt::Formatter<'_>, update: &Update) -> fmt::Result {
    let gone = |is_gone: bool| if is_gone { "- " } else { "" };
    match update {
        Update::Endpoint(key, value) => {
            write!(f, "{}pod {key}", gone(value.is_none()))?;
            if let Some(endpoint) = value {
                write!(
                    f,
                    " {} {}",
                    or_dash(&endpoint.node),
                    or_dash(&joined(&endpoint.addresses))
                )?;
                if !endpoint.service_account.is_empty() {
                    write!(f, " sa:{}", endpoint.service_account)?;
                }
                for NamedPort {
                    name,
                    protocol,
                    port,
                } in &endpoint.ports
                {
                    write!(f, " port:{name}:{}:{port}", protocol.0)?;
                }
                write_labels(f, &endpoint.labels)?;
            }
        }
        Update::Namespace(name, value) => {
            write!(f, "{}namespace {name}", gone(value.is_none()))?;
            write_labels(f, &value.clone().unwrap_or_default().labels)?;
        }
        Update::ServiceAccount(name, value) => {
            write!(f, "{}account {name}", gone(value.is_none()))?;
            write_labels(f, value.as_ref().unwrap_or(&Labels::new()))?;
        }
        Update::NetworkSet(name, value) => {
            write!(f, "{}netset {name}", gone(value.is_none()))?;
            if let Some(set) = value {
                write!(f, " {}", or_dash(&joined(&set.nets)))?;
                write_labels(f, &set.labels)?;
            }
        }
        Update::Service(name, value) => {
            write!(f, "{}service {name}", gone(value.is_none()))?;
            for Backend {
                address,
                protocol,
                port,
                ready_on: _,
            } in value.iter().flatten()
            {
                write!(f, " {address},{},{port}", protocol.0)?;
            }
        }
        Update::Tier(name, value) => {
            write!(f, "{}tier {name}", gone(value.is_none()))?;
            if let Some(tier) = value {
                write!(f, " {} {}", order(tier.order), action(tier.default_action))?;
            }
        }
        Update::Policy(key, value) => {
            write!(
                f,
                "{}policy {} {}/{}",
                gone(value.is_none()),
                key.kind.as_str(),
                key.namespace,
                key.name
            )?;
            if let Some(policy) = value {
                write_policy(f, policy)?;
            }
        }
        // Random objects have more, which policy does not depend on.
        _ => return Ok(()),
    }
    writeln!(f)
}

fn write_policy(f: &mut fmt::Formatter<'_>, policy: &Policy) -> fmt::Result {
    let types = [
        (policy.applies_ingress, "in"),
        (policy.applies_egress, "out"),
    ];
    let types: Vec<&str> = types
        .iter()
        .filter(|(applies, _)| *applies)
        .map(|(_, name)| *name)
        .collect();
    write!(
        f,
        " {} {} {} {}",
        policy.tier,
        order(policy.order),
        or_dash(&types.join(",")),
        selector(&policy.selector)
    )?;
    for (direction, rules) in [("in", &policy.ingress), ("out", &policy.egress)] {
        for rule in rules {
            write!(f, "\n  {direction} {}", rule_text(rule))?;
        }
    }
    Ok(())
}

fn rule_text(rule: &Rule) -> String {
    let mut text = action(rule.action).to_owned();
    let mut put = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            // Writing to a string cannot fail.
            let _ = write!(text, " {name}={value}");
        }
    };
    put(
        "ip",
        rule.ip_version
            .map(|version| if version == IpVersion::V4 { "4" } else { "6" }.to_owned()),
    );
    put(
        "proto",
        rule.protocol.map(|protocol| protocol.0.to_string()),
    );
    put(
        "!proto",
        rule.not_protocol.map(|protocol| protocol.0.to_string()),
    );
    put("icmp", rule.icmp.map(icmp));
    put("!icmp", rule.not_icmp.map(icmp));
    for (side, entity) in [("from", &rule.source), ("to", &rule.destination)] {
        let list = |text: String| Some(text).filter(|text| !text.is_empty());
        let parts = [
            ("net", list(joined(&entity.nets))),
            ("!net", list(joined(&entity.not_nets))),
            ("sel", entity.selector.as_ref().map(selector)),
            ("!sel", entity.not_selector.as_ref().map(selector)),
            ("port", list(ports(&entity.ports))),
            ("!port", list(ports(&entity.not_ports))),
            ("node", entity.nodes.as_ref().map(selector)),
            ("svc", entity.service.as_ref().map(ToString::to_string)),
        ];
        for (name, value) in parts {
            put(&format!("{side}.{name}"), value);
        }
    }
    text
}

fn write_labels(f: &mut fmt::Formatter<'_>, labels: &Labels) -> fmt::Result {
    labels
        .iter()
        .try_for_each(|(key, value)| write!(f, " {key}={value}"))
}

fn joined(values: &[impl Display]) -> String {
    values
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

fn ports(ports: &[Port]) -> String {
    let text = |port: &Port| match port {
        Port::Range(range) => format!("{}-{}", range.first, range.last),
        Port::Named(name) => name.clone(),
    };
    ports.iter().map(text).collect::<Vec<_>>().join(",")
}

fn icmp(icmp: Icmp) -> String {
    let part = |part: Option<u8>| part.map_or("-".to_owned(), |part| part.to_string());
    format!("{}/{}", part(icmp.kind), part(icmp.code))
}

fn selector(selector: &Selector) -> String {
    selector.to_string().replace(' ', "~")
}

fn order(order: Order) -> String {
    order
        .0
        .map_or("-".to_owned(), |number| format!("{number:e}"))
}

fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
        Action::Log => "log",
        Action::Pass => "pass",
    }
}

// ---- parsing ----

fn parse_line(case: &mut Case, line: &str) -> Result<()> {
    if let Some(rule) = line.strip_prefix("  ") {
        let Some(Update::Policy(_, Some(policy))) = case.updates.last_mut() else {
            bail!("a rule outside a policy")
        };
        let (direction, rule) = rule.split_once(' ').context("DIRECTION RULE")?;
        let rules = if direction == "in" {
            &mut policy.ingress
        } else {
            &mut policy.egress
        };
        rules.push(parse_rule(rule)?);
        return Ok(());
    }
    let (is_there, line) = line
        .strip_prefix("- ")
        .map_or((true, line), |line| (false, line));
    let words: Vec<&str> = line.split_whitespace().collect();
    let [kind, name, rest @ ..] = &words[..] else {
        bail!("KIND NAME ...")
    };
    let update = match *kind {
        "packet" => {
            case.probes.push(parse_probe(name, rest)?);
            return Ok(());
        }
        "namespace" => Update::Namespace(
            (*name).to_owned(),
            is_there.then(|| parse_labels(rest).into()),
        ),
        "account" => Update::ServiceAccount(pod(name), is_there.then(|| parse_labels(rest))),
        "pod" => Update::Endpoint(
            pod(name),
            is_there.then(|| parse_pod(&pod(name), rest)).transpose()?,
        ),
        "netset" => Update::NetworkSet(pod(name), is_there.then(|| parse_set(rest)).transpose()?),
        "service" => {
            let backends = || rest.iter().map(|word| parse_backend(word)).collect();
            Update::Service(pod(name), is_there.then(backends).transpose()?)
        }
        "tier" => Update::Tier(
            (*name).to_owned(),
            is_there.then(|| parse_tier(rest)).transpose()?,
        ),
        "policy" => {
            let [of, rest @ ..] = rest else {
                bail!("policy KIND NAMESPACE/NAME ...")
            };
            let NamespacedName {
                namespace,
                name: of,
            } = pod(of);
            let key = PolicyKey {
                kind: PolicyKind::parse(name).context("a kind of policy")?,
                namespace,
                name: of,
            };
            Update::Policy(key, is_there.then(|| parse_policy(rest)).transpose()?)
        }
        other => bail!("unknown kind {other:?}"),
    };
    case.updates.push(update);
    Ok(())
}

fn parse_probe(source: &str, rest: &[&str]) -> Result<Probe> {
    let [destination, protocol, from, to, icmp] = rest else {
        bail!("packet FROM TO PROTOCOL PORT PORT TYPE/CODE")
    };
    let (kind, code) = icmp.split_once('/').context("TYPE/CODE")?;
    Ok(Probe {
        source: source.parse()?,
        destination: destination.parse()?,
        protocol: protocol.parse()?,
        ports: (from.parse()?, to.parse()?),
        icmp: (kind.parse()?, code.parse()?),
    })
}

fn parse_labels(words: &[&str]) -> Labels {
    let pairs = words.iter().filter_map(|word| word.split_once('='));
    pairs
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn list<T: FromStr>(text: &str) -> Result<Vec<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let parts = text
        .split(',')
        .filter(|part| !part.is_empty() && *part != "-");
    parts
        .map(|part| part.parse().with_context(|| format!("{part:?}")))
        .collect()
}

fn parse_pod(key: &NamespacedName, words: &[&str]) -> Result<WorkloadEndpoint> {
    let [node, addresses, rest @ ..] = words else {
        bail!("pod NAME NODE ADDRESSES ...")
    };
    let named = |text: &str| -> Result<NamedPort> {
        let [name, protocol, port] = text.split(':').collect::<Vec<_>>()[..] else {
            bail!("port:NAME:PROTOCOL:PORT")
        };
        Ok(NamedPort {
            name: name.to_owned(),
            protocol: Protocol(protocol.parse()?),
            port: port.parse()?,
        })
    };
    let ports = rest
        .iter()
        .filter_map(|word| word.strip_prefix("port:"))
        .map(named)
        .collect::<Result<_>>()?;
    Ok(WorkloadEndpoint {
        node: if *node == "-" {
            String::new()
        } else {
            (*node).to_owned()
        },
        labels: parse_labels(rest),
        service_account: rest
            .iter()
            .find_map(|word| word.strip_prefix("sa:"))
            .unwrap_or_default()
            .to_owned(),
        addresses: list(addresses)?,
        ports,
        uid: String::new(),
        interface: interface_name(key),
    })
}

fn parse_set(words: &[&str]) -> Result<NetworkSet> {
    let [nets, rest @ ..] = words else {
        bail!("netset NAME RANGES ...")
    };
    Ok(NetworkSet {
        labels: parse_labels(rest),
        nets: list(nets)?,
    })
}

fn parse_backend(word: &str) -> Result<Backend> {
    let [address, protocol, port] = word.split(',').collect::<Vec<_>>()[..] else {
        bail!("ADDRESS,PROTOCOL,PORT")
    };
    Ok(Backend {
        address: address.parse()?,
        protocol: Protocol(protocol.parse()?),
        port: port.parse()?,
        ready_on: None,
    })
}

fn parse_tier(words: &[&str]) -> Result<Tier> {
    let [order, action] = words else {
        bail!("tier NAME ORDER ACTION")
    };
    Ok(Tier {
        order: parse_order(order)?,
        default_action: parse_action(action)?,
    })
}

fn parse_policy(words: &[&str]) -> Result<Policy> {
    let [tier, order, types, selector] = words else {
        bail!("policy KIND NAME TIER ORDER DIRECTIONS SELECTOR")
    };
    Ok(Policy {
        tier: (*tier).to_owned(),
        order: parse_order(order)?,
        selector: parse_selector(selector)?,
        traffic: Traffic::Normal,
        applies_ingress: types.split(',').any(|found| found == "in"),
        applies_egress: types.split(',').any(|found| found == "out"),
        ingress: Vec::new(),
        egress: Vec::new(),
    })
}

fn parse_rule(text: &str) -> Result<Rule> {
    let mut words = text.split_whitespace();
    let mut rule = Rule::any(parse_action(words.next().context("an action")?)?);
    for word in words {
        let (name, value) = word.split_once('=').context("NAME=VALUE")?;
        match name {
            "ip" => {
                rule.ip_version = Some(if value == "4" {
                    IpVersion::V4
                } else {
                    IpVersion::V6
                })
            }
            "proto" => rule.protocol = Some(Protocol(value.parse()?)),
            "!proto" => rule.not_protocol = Some(Protocol(value.parse()?)),
            "icmp" => rule.icmp = Some(parse_icmp(value)?),
            "!icmp" => rule.not_icmp = Some(parse_icmp(value)?),
            _ => {
                let (side, name) = name.split_once('.').context("SIDE.NAME")?;
                let entity = if side == "from" {
                    &mut rule.source
                } else {
                    &mut rule.destination
                };
                parse_criterion(entity, name, value)?;
            }
        }
    }
    Ok(rule)
}

fn parse_criterion(entity: &mut EntityMatch, name: &str, value: &str) -> Result<()> {
    match name {
        "net" => entity.nets = list(value)?,
        "!net" => entity.not_nets = list(value)?,
        "sel" => entity.selector = Some(parse_selector(value)?),
        "!sel" => entity.not_selector = Some(parse_selector(value)?),
        "port" => entity.ports = parse_ports(value).into(),
        "!port" => entity.not_ports = parse_ports(value),
        "node" => entity.nodes = Some(parse_selector(value)?),
        "svc" => entity.service = Some(pod(value)),
        other => bail!("unknown criterion {other:?}"),
    }
    Ok(())
}

fn parse_ports(text: &str) -> Vec<Port> {
    let range = |text: &str| {
        let (first, last) = text.split_once('-')?;
        Some(PortRange {
            first: first.parse().ok()?,
            last: last.parse().ok()?,
        })
    };
    text.split(',')
        .map(|text| range(text).map_or_else(|| Port::Named(text.to_owned()), Port::Range))
        .collect()
}

fn parse_icmp(text: &str) -> Result<Icmp> {
    let (kind, code) = text.split_once('/').context("TYPE/CODE")?;
    Ok(Icmp {
        kind: kind.parse().ok(),
        code: code.parse().ok(),
    })
}

fn parse_selector(text: &str) -> Result<Selector> {
    Ok(Selector::parse(&text.replace('~', " "))?)
}

fn parse_order(text: &str) -> Result<Order> {
    Ok(Order(if text == "-" {
        None
    } else {
        Some(text.parse()?)
    }))
}

fn parse_action(text: &str) -> Result<Action> {
    let all = [Action::Allow, Action::Deny, Action::Log, Action::Pass];
    all.into_iter()
        .find(|found| action(*found) == text)
        .with_context(|| format!("unknown action {text:?}"))
}
