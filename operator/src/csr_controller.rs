//! Carries out the decisions of [`crate::csr_policy`]: approves, denies and signs
//! CertificateSigningRequests.

use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{
    CertificateSigningRequest, CertificateSigningRequestCondition,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{Api, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use margay_runtime::backoff::{Backoff, jitter};
use margay_runtime::shutdown::Shutdown;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::certs::{Authority, issue};
use crate::client::bounded;
use crate::csr_policy::{CsrDecision, SIGNER, decide};

/// Reasons why a decision was not carried out.
#[derive(Debug, thiserror::Error)]
enum CsrError {
    #[error("{0}")]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Issue(#[from] issue::IssueError),
}

/// Outcome of one step.
enum Progress {
    /// Nothing more to do now.
    Done,
    /// The request has changed: decide again.
    Changed(Box<CertificateSigningRequest>),
}

/// Watches requests and handles each, while there is a CA and this operator leads. Ends with the
/// process.
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

/// Serves one term: from the moment that this operator leads and has a CA until either changes.
async fn serve(
    client: &Client,
    mut authority: watch::Receiver<Option<Authority>>,
    mut leading: watch::Receiver<bool>,
) {
    let Some(current) = ready(&mut authority, &mut leading).await else {
        std::future::pending::<()>().await;
        return;
    };
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let config = watcher::Config::default().fields(&format!("spec.signerName={SIGNER}"));
    let requests = watcher(api.clone(), config)
        .default_backoff()
        .applied_objects();
    let mut requests = std::pin::pin!(requests);
    loop {
        tokio::select! {
            _ = authority.changed() => return,
            _ = leading.changed() => return,
            request = requests.next() => match request {
                Some(Ok(request)) => handle(&api, &current, request).await,
                Some(Err(error)) => warn!(
                    %error,
                    "watch of CertificateSigningRequests interrupted, retrying",
                ),
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

/// Handles one request to its end. A failure is retried a few times; after that the next event or
/// term does.
async fn handle(
    api: &Api<CertificateSigningRequest>,
    authority: &Authority,
    mut request: CertificateSigningRequest,
) {
    let mut pause = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let name = request.name_any();
    for _ in 0..5 {
        match step(api, authority, &request).await {
            Ok(Progress::Done) => return,
            Ok(Progress::Changed(changed)) => request = *changed,
            Err(error) => {
                // The watch often lags behind our own writes; then there is nothing left to do.
                if !is_conflict(&error) {
                    warn!(request = name, %error, "request not handled, retrying");
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

fn is_conflict(error: &CsrError) -> bool {
    matches!(error, CsrError::Api(kube::Error::Api(status)) if status.code == 409)
}

async fn step(
    api: &Api<CertificateSigningRequest>,
    authority: &Authority,
    request: &CertificateSigningRequest,
) -> Result<Progress, CsrError> {
    let name = request.name_any();
    let params = PostParams::default();
    match decide(request) {
        CsrDecision::Ignore => Ok(Progress::Done),
        CsrDecision::Approve => {
            let reason = "NodeOfToken";
            let message = "the node is the one that the requester's token is bound to";
            let decided = with_condition(request, "Approved", reason, message);
            let changed = api.replace_subresource("approval", &name, &params, &decided);
            Ok(Progress::Changed(Box::new(bounded(changed).await?)))
        }
        CsrDecision::Deny(rule) => {
            warn!(request = name, rule, "request denied");
            let decided = with_condition(request, "Denied", "RuleBroken", &rule);
            bounded(api.replace_subresource("approval", &name, &params, &decided)).await?;
            Ok(Progress::Done)
        }
        CsrDecision::Fail(rule) => {
            warn!(request = name, rule, "approved request refused");
            let decided = with_condition(request, "Failed", "RuleBroken", &rule);
            bounded(api.replace_subresource("status", &name, &params, &decided)).await?;
            Ok(Progress::Done)
        }
        CsrDecision::Sign(grant) => {
            let pem = issue::node(
                authority,
                &grant.node,
                &grant.key,
                grant.life,
                Timestamp::now(),
            )?;
            let mut signed = request.clone();
            signed.status.get_or_insert_default().certificate = Some(ByteString(pem.into_bytes()));
            bounded(api.replace_subresource("status", &name, &params, &signed)).await?;
            info!(request = name, node = grant.node, "certificate signed");
            Ok(Progress::Done)
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
    status
        .conditions
        .get_or_insert_default()
        .push(CertificateSigningRequestCondition {
            type_: kind.to_owned(),
            status: "True".to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_update_time: Some(Time(Timestamp::now())),
            last_transition_time: None,
        });
    decided
}
