//! Critical tasks: when one of them ends, by a panic or otherwise, the process must exit and be
//! restarted. A process that went on would serve its last state for ever.

use std::any::Any;
use std::collections::BTreeMap;

use tokio::task::{Id, JoinError, JoinSet};

/// A critical task has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("task {task} has ended: {reason}; the process exits and must be restarted")]
pub struct Ended {
    /// Its name.
    pub task: String,
    /// Panic message, or how the task ended.
    pub reason: String,
}

/// Owner of critical tasks; they end with it.
#[derive(Debug, Default)]
pub struct Tasks {
    set: JoinSet<()>,
    names: BTreeMap<Id, String>,
}

impl Tasks {
    /// Starts a task.
    pub fn spawn(&mut self, name: &str, task: impl Future<Output = ()> + Send + 'static) {
        let handle = self.set.spawn(task);
        self.names.insert(handle.id(), name.to_owned());
    }

    /// Waits until one of the tasks ends; pends for ever without tasks. Cancel safe.
    pub async fn wait_for_end(&mut self) -> Ended {
        match self.set.join_next_with_id().await {
            Some(Ok((id, ()))) => {
                self.describe(id, "it returned, which it never should".to_owned())
            }
            Some(Err(error)) => self.describe(error.id(), reason(error)),
            None => std::future::pending().await,
        }
    }

    /// Aborts the remaining tasks and waits for them.
    pub async fn shutdown(&mut self) {
        self.set.shutdown().await;
    }

    fn describe(&self, id: Id, reason: String) -> Ended {
        Ended {
            task: self.names.get(&id).cloned().unwrap_or_default(),
            reason,
        }
    }
}

fn reason(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => format!("panic: {}", panic_message(&*panic)),
        Err(error) => error.to_string(),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_task_to_end_is_reported_with_its_reason() {
        let mut tasks = Tasks::default();
        tasks.spawn("lives", std::future::pending());
        tasks.spawn("panics", async { panic!("object {} is odd", 7) });
        let ended = tasks.wait_for_end().await;
        assert_eq!(
            (ended.task.as_str(), ended.reason.as_str()),
            ("panics", "panic: object 7 is odd")
        );
        tasks.spawn("returns", async {});
        assert_eq!(tasks.wait_for_end().await.task, "returns");
        tasks.shutdown().await;
    }
}
