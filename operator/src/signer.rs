//! Carries out the verdicts of [`crate::csr`]: approves, denies, signs.

use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_runtime::backoff::{Backoff, jitter};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::apply::bounded;
use crate::certs::{Authority, sign};
use crate::csr::{SIGNER, Verdict, decide};

/// Why a verdict was not carried out.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Sign(#[from] sign::Error),
}

/// What happened to a request.
enum Outcome {
    /// Nothing more is to be done now.
    Done,
    /// It changed; decide again.
    Changed(Box<CertificateSigningRequest>),
}

/// Watches requests and answers each, while there is an authority and this operator leads. Ends with the process.
pub async fn run(
    client: Client,
    authority: watch::Receiver<Option<Authority>>,
    leading: watch::Receiver<bool>,
    shutdown: Shutdown,
) {
    loop {
        tokio::select! {
            () = shutdown.wait() => return,
            () = serve(&client, authority.clone(), leading.clone()) => {}
        }
    }
}

/// One term: from the moment that this operator leads and has an authority to the moment that either changes.
async fn serve(client: &Client, mut authority: watch::Receiver<Option<Authority>>, mut leading: watch::Receiver<bool>) {
    let Some(current) = ready(&mut authority, &mut leading).await else {
        std::future::pending::<()>().await;
        return;
    };
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
    let requests = watcher(api.clone(), config).default_backoff().applied_objects();
    let mut requests = std::pin::pin!(requests);
    loop {
        tokio::select! {
            _ = authority.changed() => return,
            _ = leading.changed() => return,
            request = requests.next() => match request {
                Some(Ok(request)) => answer(&api, &current, request).await,
                Some(Err(error)) => warn!(%error, "watch of requests interrupted, trying again"),
                None => return,
            },
        }
    }
}

/// Waits for both conditions; none when the process is about to end.
async fn ready(
    authority: &mut watch::Receiver<Option<Authority>>,
    leading: &mut watch::Receiver<bool>,
) -> Option<Authority> {
    leading.wait_for(|leads| *leads).await.ok()?;
    let current = authority.wait_for(Option::is_some).await.ok()?;
    current.clone()
}

/// Brings one request to its end. A failure is tried again a few times; after that the next event or term does.
async fn answer(api: &Api<CertificateSigningRequest>, authority: &Authority, mut request: CertificateSigningRequest) {
    let mut pause = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let name = request.name_any();
    for _ in 0..5 {
        match act(api, authority, &request).await {
            Ok(Outcome::Done) => return,
            Ok(Outcome::Changed(changed)) => request = *changed,
            Err(error) => {
                // The watch is often behind what was just decided here; then there is nothing left to do.
                if !is_conflict(&error) {
                    warn!(request = name, %error, "request not answered, trying again");
                }
                tokio::time::sleep(pause.next(jitter())).await;
                match bounded(api.get_opt(&name)).await {
                    Ok(Some(current)) => request = current,
                    Ok(None) => return,
                    Err(error) => warn!(request = name, %error, "request cannot be read"),
                }
            }
        }
    }
}

fn is_conflict(error: &Failed) -> bool {
    matches!(error, Failed::Api(kube::Error::Api(status)) if status.code == 409)
}

async fn act(
    api: &Api<CertificateSigningRequest>,
    authority: &Authority,
    request: &CertificateSigningRequest,
) -> Result<Outcome, Failed> {
    let name = request.name_any();
    let params = PostParams::default();
    match decide(request) {
        Verdict::Ignore => Ok(Outcome::Done),
        Verdict::Approve => {
            let reason = "NodeOfToken";
            let message = "names the node that the requester's token is bound to";
            let decided = with_condition(request, "Approved", reason, message);
            let changed = api.replace_subresource("approval", &name, &params, &decided);
            Ok(Outcome::Changed(Box::new(bounded(changed).await?)))
        }
        Verdict::Deny(rule) => {
            warn!(request = name, rule, "request denied");
            let decided = with_condition(request, "Denied", "RuleBroken", &rule);
            bounded(api.replace_subresource("approval", &name, &params, &decided)).await?;
            Ok(Outcome::Done)
        }
        Verdict::Fail(rule) => {
            warn!(request = name, rule, "approved request refused");
            let decided = with_condition(request, "Failed", "RuleBroken", &rule);
            bounded(api.replace_subresource("status", &name, &params, &decided)).await?;
            Ok(Outcome::Done)
        }
        Verdict::Sign(grant) => {
            let pem = sign::node(authority, &grant.node, &grant.key, grant.life, Timestamp::now())?;
            let mut signed = request.clone();
            signed.status.get_or_insert_default().certificate = Some(ByteString(pem.into_bytes()));
            bounded(api.replace_subresource("status", &name, &params, &signed)).await?;
            info!(request = name, node = grant.node, "certificate signed");
            Ok(Outcome::Done)
        }
    }
}

fn with_condition(
    request: &CertificateSigningRequest,
    kind: &str,
    reason: &str,
    message: &str,
) -> CertificateSigningRequest {
    let mut decided = request.clone();
    let status = decided.status.get_or_insert_default();
    status.conditions.get_or_insert_default().push(CertificateSigningRequestCondition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(Timestamp::now())),
        last_transition_time: None,
    });
    decided
}
