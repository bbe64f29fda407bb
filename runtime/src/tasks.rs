//! Tasks without which a process must not go on: when one of them ends, by a panic or otherwise, the process is to end and to be started anew.
//! One that lived on would serve the state of that moment for ever.

use std::any::Any;
use std::collections::BTreeMap;

use tokio::task::{Id, JoinError, JoinSet};

/// A task that must not end has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("task {task} has ended: {reason}; the process ends too, to be started anew")]
pub struct Ended {
    /// Its name.
    pub task: String,
    /// The words of its panic, or that it had none.
    pub reason: String,
}

/// Owner of such tasks; they end with it.
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

    /// Returns when one of the tasks has ended; not while there are none. Can be dropped and called again.
    pub async fn ended(&mut self) -> Ended {
        match self.set.join_next_with_id().await {
            Some(Ok((id, ()))) => self.of(id, "it returned, which it never should".to_owned()),
            Some(Err(error)) => self.of(error.id(), reason(error)),
            None => std::future::pending().await,
        }
    }

    /// Ends the tasks that are still there.
    pub async fn shutdown(&mut self) {
        self.set.shutdown().await;
    }

    fn of(&self, id: Id, reason: String) -> Ended {
        Ended { task: self.names.get(&id).cloned().unwrap_or_default(), reason }
    }
}

fn reason(error: JoinError) -> String {
    match error.try_into_panic() {
        Ok(panic) => format!("panic: {}", words(&*panic)),
        Err(error) => error.to_string(),
    }
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without words")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_end_of_a_task_is_told_with_its_reason() {
        let mut tasks = Tasks::default();
        tasks.spawn("lives", std::future::pending());
        tasks.spawn("panics", async { panic!("object {} is odd", 7) });
        let ended = tasks.ended().await;
        assert_eq!((ended.task.as_str(), ended.reason.as_str()), ("panics", "panic: object 7 is odd"));
        tasks.spawn("returns", async {});
        assert_eq!(tasks.ended().await.task, "returns");
        tasks.shutdown().await;
    }
}
