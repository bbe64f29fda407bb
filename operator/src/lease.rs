//! Which of several operators acts: the holder of the Lease `margay-operator`.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use kube::{Client, Error};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::apply::bounded;

/// Name of the Lease.
const NAME: &str = "margay-operator";
/// How long a holder that is not heard of keeps the lease.
const DURATION: Duration = Duration::from_secs(15);
/// How often the holder is heard of, and others look.
const PERIOD: Duration = Duration::from_secs(4);

/// What to do about a lease.
#[derive(Debug, PartialEq)]
enum Move {
    /// It is free, ours, or its holder has been silent for too long: write this.
    Write(LeaseSpec),
    /// Somebody else holds it.
    Wait,
}

/// Decides on the lease as found. Silence is measured by our own clock since `seen`, when this renewal was first seen: clocks of machines differ.
fn decide(found: Option<&LeaseSpec>, me: &str, now: Timestamp, silent: Duration) -> Move {
    let holder = found.and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default();
    let theirs = !holder.is_empty() && holder != me;
    let term = found
        .and_then(|spec| spec.lease_duration_seconds)
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DURATION, Duration::from_secs);
    if theirs && silent < term {
        return Move::Wait;
    }
    let mut spec = found.cloned().unwrap_or_default();
    if holder != me {
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
    }
    spec.holder_identity = Some(me.to_owned());
    spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
    spec.renew_time = Some(MicroTime(now));
    Move::Write(spec)
}

/// Holds, or tries to hold, the lease until shutdown, when it is given up; tells `leading` about it.
pub async fn hold(client: Client, namespace: String, me: String, leading: watch::Sender<bool>, shutdown: Shutdown) {
    let api: Api<Lease> = Api::namespaced(client, &namespace);
    let mut seen: (Option<MicroTime>, tokio::time::Instant) = (None, tokio::time::Instant::now());
    let mut renewed = tokio::time::Instant::now();
    loop {
        match bounded(attempt(&api, &me, &mut seen)).await {
            Ok(held) => {
                renewed = tokio::time::Instant::now();
                set(&leading, held);
            }
            Err(error) => {
                warn!(%error, "the lease cannot be read or written, trying again");
                // Another operator may act as soon as our term is over.
                if renewed.elapsed() >= DURATION {
                    set(&leading, false);
                }
            }
        }
        tokio::select! {
            () = shutdown.wait() => break,
            () = tokio::time::sleep(PERIOD) => {}
        }
    }
    if *leading.borrow() {
        set(&leading, false);
        if let Err(error) = bounded(release(&api, &me)).await {
            warn!(%error, "the lease was not given up; it ends by itself");
        }
    }
}

fn set(leading: &watch::Sender<bool>, held: bool) {
    let changed = leading.send_if_modified(|before| std::mem::replace(before, held) != held);
    if changed {
        info!(leading = held, "leadership changed");
    }
}

async fn attempt(
    api: &Api<Lease>,
    me: &str,
    seen: &mut (Option<MicroTime>, tokio::time::Instant),
) -> Result<bool, Error> {
    let found = api.get_opt(NAME).await?;
    let spec = found.as_ref().and_then(|lease| lease.spec.as_ref());
    let renewal = spec.and_then(|spec| spec.renew_time.clone());
    if seen.0 != renewal {
        *seen = (renewal, tokio::time::Instant::now());
    }
    let Move::Write(spec) = decide(spec, me, Timestamp::now(), seen.1.elapsed()) else {
        return Ok(false);
    };
    let params = PostParams::default();
    let written = match found {
        Some(mut lease) => {
            lease.spec = Some(spec);
            api.replace(NAME, &params, &lease).await
        }
        None => {
            let lease = Lease {
                metadata: ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() },
                spec: Some(spec),
            };
            api.create(&params, &lease).await
        }
    };
    match written {
        Ok(_) => Ok(true),
        Err(Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error),
    }
}

async fn release(api: &Api<Lease>, me: &str) -> Result<(), Error> {
    let Some(mut lease) = api.get_opt(NAME).await? else {
        return Ok(());
    };
    let spec = lease.spec.get_or_insert_default();
    if spec.holder_identity.as_deref() == Some(me) {
        spec.holder_identity = None;
        api.replace(NAME, &PostParams::default(), &lease).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(who: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(who.to_owned()),
            lease_duration_seconds: Some(15),
            lease_transitions: Some(3),
            ..LeaseSpec::default()
        }
    }

    fn written(decision: Move) -> (String, i32) {
        let Move::Write(spec) = decision else {
            panic!("the lease should be written");
        };
        (spec.holder_identity.unwrap_or_default(), spec.lease_transitions.unwrap_or_default())
    }

    #[test]
    fn a_lease_is_taken_when_it_is_free_or_silent() {
        let now = Timestamp::UNIX_EPOCH;
        let short = Duration::from_secs(14);
        let long = Duration::from_secs(15);
        assert_eq!(decide(Some(&held_by("b")), "a", now, short), Move::Wait);
        assert_eq!(written(decide(Some(&held_by("b")), "a", now, long)), ("a".to_owned(), 4));
        assert_eq!(written(decide(Some(&held_by("a")), "a", now, short)), ("a".to_owned(), 3));
        assert_eq!(written(decide(None, "a", now, short)), ("a".to_owned(), 1));
        assert_eq!(written(decide(Some(&held_by("")), "a", now, short)), ("a".to_owned(), 4));
    }
}
