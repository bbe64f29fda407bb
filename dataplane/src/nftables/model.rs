//! A model of the kernel for tests: as strict as nf_tables, so that it refuses the transactions
//! that the kernel would refuse.

use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use crate::nftables::kernel::Kernel;
use margay_nft::{
    Chain, ExecError, Ruleset, Set, TableName, Transaction, TransactionOp as Op, diff,
};

/// Fault injection: decides whether an operation fails.
pub type FaultInjection = Box<dyn Fn(&Op) -> bool + Send>;

/// Model of the kernel. Cheap to clone; clones share one kernel.
#[derive(Clone)]
pub struct Model(Arc<Mutex<Inner>>);

pub struct Inner {
    pub table: Option<Ruleset>,
    /// Number of transactions committed.
    pub commits: usize,
    /// Operations for which this returns true are refused.
    pub refuses: FaultInjection,
    /// Number of requests that fail before they are read.
    pub outages: usize,
    /// The next transaction loses a chain to another program, without a notification.
    pub unreported: bool,
    /// Number of reads that other programs interrupt.
    pub interruptions: usize,
    /// Number of reads.
    pub readings: usize,
    /// Maximal number of rules and elements per transaction, and the error number above it.
    pub room: (usize, i32),
}

impl Model {
    pub fn new() -> Self {
        let refuses = Box::new(|_: &Op| false);
        let inner = Inner {
            table: None,
            commits: 0,
            refuses,
            outages: 0,
            unreported: false,
            interruptions: 0,
            readings: 0,
            room: (usize::MAX, 0),
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }

    pub fn table(&self) -> Option<Ruleset> {
        self.lock().table.clone()
    }
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

impl Inner {
    fn outage(&mut self) -> io::Result<()> {
        match self.outages.checked_sub(1) {
            Some(left) => {
                self.outages = left;
                Err(io::Error::from_raw_os_error(libc::ENOMEM))
            }
            None => Ok(()),
        }
    }
}

impl Kernel for Model {
    fn exec(&mut self, transaction: &Transaction) -> Result<bool, ExecError> {
        let mut inner = self.lock();
        inner.outage().map_err(ExecError::Send)?;
        let brings = |op: &Op| match op {
            Op::AppendRules(_, chain, from) => chain.rules.len() - from,
            Op::AddElements(_, elements) => elements.elements.len(),
            _ => 0,
        };
        let (room, error) = inner.room;
        if transaction.ops().iter().map(brings).sum::<usize>() > room {
            return Err(ExecError::Send(io::Error::from_raw_os_error(error)));
        }
        let mut table = inner.table.clone();
        for (index, op) in transaction.ops().iter().enumerate() {
            let refused = |why: String| ExecError::Refused {
                operation: op.to_string(),
                index: Some(index),
                source: io::Error::from_raw_os_error(libc::EINVAL),
                message: Some(why),
            };
            if (inner.refuses)(op) {
                return Err(refused("an injected fault".to_owned()));
            }
            step(&mut table, transaction.table(), op).map_err(refused)?;
        }
        if let Some(table) = &table {
            table.check().map_err(|faults| ExecError::Refused {
                operation: "commit".to_owned(),
                index: None,
                source: io::Error::from_raw_os_error(libc::ENOENT),
                message: Some(format!("{faults:?}")),
            })?;
        }
        inner.table = table;
        inner.commits += 1;
        let unreported = std::mem::take(&mut inner.unreported);
        if unreported && let Some(table) = &mut inner.table {
            table.chains.pop_last();
        }
        Ok(unreported)
    }

    fn is_programmed(&mut self, _: &TableName) -> io::Result<bool> {
        Ok(self.lock().table.is_some())
    }

    fn read_diff(&mut self, wanted: &Ruleset) -> io::Result<Transaction> {
        let mut inner = self.lock();
        inner.outage()?;
        inner.readings += 1;
        if let Some(left) = inner.interruptions.checked_sub(1) {
            inner.interruptions = left;
            return Err(io::ErrorKind::Interrupted.into());
        }
        let present = inner
            .table
            .clone()
            .unwrap_or_else(|| Ruleset::new(wanted.table.clone()));
        Ok(diff(&present, wanted))
    }
}

fn step(table: &mut Option<Ruleset>, name: &TableName, op: &Op) -> Result<(), String> {
    if matches!(op, Op::CreateTable) {
        table.get_or_insert_with(|| Ruleset::new(name.clone()));
        return Ok(());
    }
    if matches!(op, Op::DeleteTable) {
        return table.take().map(drop).ok_or_else(|| "no table".to_owned());
    }
    let table = table.as_mut().ok_or("no table")?;
    match op {
        Op::PutChain(name, base) => match table.chains.get_mut(name).map(Arc::make_mut) {
            Some(chain) if base.is_some() => chain.base = *base,
            Some(_) => return Err("the chain exists".to_owned()),
            None => table.put_chain(
                name.clone(),
                Chain {
                    base: *base,
                    rules: Vec::new(),
                },
            ),
        },
        Op::FlushChain(name) => Arc::make_mut(table.chains.get_mut(name).ok_or("no chain")?)
            .rules
            .clear(),
        Op::DeleteChain(name) => {
            let chain = table.chains.remove(name).ok_or("no chain")?;
            if !chain.rules.is_empty() {
                return Err("the chain has rules".to_owned());
            }
        }
        Op::CreateSet(name, kind) => {
            if table
                .sets
                .insert(name.clone(), Arc::new(Set::new(kind.clone())))
                .is_some()
            {
                return Err("the set exists".to_owned());
            }
        }
        Op::DeleteSet(name) => drop(table.sets.remove(name).ok_or("no set")?),
        Op::AddElements(name, elements) => {
            let set = Arc::make_mut(table.sets.get_mut(name).ok_or("no set")?);
            if set.kind != elements.kind {
                return Err("the set is of another kind".to_owned());
            }
            for (key, value) in &elements.elements {
                if set
                    .elements
                    .insert(key.clone(), value.clone())
                    .is_some_and(|old| old != *value)
                {
                    return Err(format!("{key} has another value"));
                }
            }
        }
        Op::DeleteElements(name, elements) => {
            let set = Arc::make_mut(table.sets.get_mut(name).ok_or("no set")?);
            for key in elements.elements.keys() {
                set.elements
                    .remove(key)
                    .ok_or_else(|| format!("no element {key}"))?;
            }
        }
        Op::AppendRules(name, chain, from) => {
            Arc::make_mut(table.chains.get_mut(name).ok_or("no chain")?)
                .rules
                .extend_from_slice(&chain.rules[*from..]);
        }
        Op::CreateTable | Op::DeleteTable => {}
    }
    Ok(())
}
