//! The port for Prometheus: open where the Installation says so, else as FelixConfiguration does.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use margay_calc::model::{Record, RecordId};
use margay_runtime::admin::{self, MetricsPort};
use prometheus_client::registry::Registry;
use tokio::time::timeout;

use crate::agent::AgentHandle;
use crate::problems::Problems;
use crate::state::State;

/// Shortest time between two looks at the settings, which seldom change.
const LOOK: Duration = Duration::from_secs(1);
/// Time after which a port that could not be opened is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// Keeps the port as the settings have it until the agent ends; `fixed` is the address that the
/// Installation gives, which goes first.
pub async fn run(
    fixed: Option<SocketAddr>,
    registry: Arc<Registry>,
    agent: AgentHandle,
    problems: Problems,
) {
    let mut status = agent.watch();
    let mut port: Option<MetricsPort> = None;
    let mut wanted: Result<Option<SocketAddr>, String> = Ok(None);
    loop {
        status.mark_unchanged();
        let now = match fixed {
            Some(address) => Ok(Some(address)),
            None => match agent.inspect(|state, _| configured(state)).await {
                // There is no view yet.
                Some(Some(configured)) => configured,
                Some(None) => Ok(None),
                None => return,
            },
        };
        if now != wanted || (port.is_none() && matches!(now, Ok(Some(_)))) {
            // Closed first: the new address may be the same port.
            drop(port.take());
            let opened = open(&now, &registry).await;
            problems.report(
                "metrics-port",
                false,
                opened.as_ref().err().map(String::as_str),
            );
            port = opened.ok().flatten();
            wanted = now;
        }
        tokio::time::sleep(LOOK).await;
        // A change, or the time to try again.
        if let Ok(Err(_)) = timeout(RETRY, status.changed()).await {
            return;
        }
    }
}

/// Address according to the settings of the view: none if they have it off; `None` without a view.
fn configured(state: &State) -> Option<Result<Option<SocketAddr>, String>> {
    let Some(Record::Settings(settings)) = state.records().get(&RecordId::Settings) else {
        return None;
    };
    if !settings.metrics_enabled {
        return Some(Ok(None));
    }
    let host = match settings.metrics_host.as_str() {
        "" => Ok(IpAddr::from(Ipv6Addr::UNSPECIFIED)),
        host => host.parse().map_err(|_| {
            format!(
                "prometheusMetricsHost of FelixConfiguration is {host:?}, which is not an IP \
                 address: metrics are on the loopback only; write an address, or remove it"
            )
        }),
    };
    Some(host.map(|host| Some(SocketAddr::new(host, settings.metrics_port))))
}

async fn open(
    wanted: &Result<Option<SocketAddr>, String>,
    registry: &Arc<Registry>,
) -> Result<Option<MetricsPort>, String> {
    let Some(address) = wanted.clone()? else {
        return Ok(None);
    };
    let setting = "prometheusMetricsHost and prometheusMetricsPort of FelixConfiguration, or \
                   nodeMetricsPort of the Installation";
    let opened = admin::serve_metrics(address, registry.clone(), setting).await;
    opened
        .map(Some)
        .map_err(|error| format!("metrics are on the loopback only: {error}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use margay_api::settings::FelixSettings;

    use super::*;

    #[test]
    fn the_address_is_that_of_the_settings() {
        let off = FelixSettings::default();
        let on = |host: &str, port| FelixSettings {
            metrics_enabled: true,
            metrics_host: host.to_owned(),
            metrics_port: port,
            ..FelixSettings::default()
        };
        let table = [
            (off, Ok(None)),
            (on("", 9091), Ok(Some("[::]:9091"))),
            (on("192.0.2.1", 9999), Ok(Some("192.0.2.1:9999"))),
            (on("fd00::1", 1), Ok(Some("[fd00::1]:1"))),
            (on("here", 1), Err("prometheusMetricsHost")),
        ];
        for (settings, wanted) in table {
            let records = [(RecordId::Settings, Record::Settings(settings))];
            let state = State::with_records(records.into());
            let address = configured(&state).expect("there are settings");
            match (address, wanted) {
                (Ok(address), Ok(wanted)) => {
                    assert_eq!(
                        address.map(|address| address.to_string()).as_deref(),
                        wanted
                    );
                }
                (Err(problem), Err(field)) => assert!(problem.contains(field), "{problem}"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(configured(&State::with_records(BTreeMap::new())), None);
    }
}
