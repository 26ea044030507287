//! Owns one node as a process of this program: start, SIGKILL, SIGTERM, and what its log says when it
//! ends. Does not know the cluster it belongs to. The end-to-end tests use it too.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::failure::Failure;

use super::ports::Ports;

/// The end of a log that is looked at when a node does not start.
const LOG_TAIL_BYTES: u64 = 4 << 10;

/// How a node is started.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// The program: this one.
    pub program: PathBuf,
    /// Identity, log and shards; the log file of the process stands beside it.
    pub data_dir: PathBuf,
    /// Where it listens.
    pub ports: Ports,
    /// Its failure domain.
    pub zone: String,
    /// Peer addresses of all nodes.
    pub join: Vec<String>,
    /// Settings, `key=value`.
    pub settings: Vec<String>,
}

impl NodePlan {
    /// The command line behind the program's name.
    pub fn args(&self) -> Vec<String> {
        let mut args = vec![
            "server".to_owned(),
            format!("--data-dir={}", self.data_dir.display()),
            format!("--listen={}", self.ports.client),
            format!("--peer-listen={}", self.ports.peer),
            format!("--http-listen={}", self.ports.http),
            format!("--join={}", self.join.join(",")),
            format!("--zone={}", self.zone),
            "--log-format=text".to_owned(),
            format!("--exit-with-parent={}", std::process::id()),
        ];
        args.extend(self.settings.iter().map(|setting| format!("--set={setting}")));
        args
    }

    /// Where the process's output goes.
    pub fn log(&self) -> PathBuf {
        self.data_dir.with_extension("log")
    }
}

/// A node that runs, or ran. Killed when it is dropped.
#[derive(Debug)]
pub struct NodeProcess {
    plan: NodePlan,
    child: Option<Child>,
}

impl NodeProcess {
    /// Not started yet.
    pub fn new(plan: NodePlan) -> NodeProcess {
        NodeProcess { plan, child: None }
    }

    /// How it is started.
    pub fn plan(&self) -> &NodePlan {
        &self.plan
    }

    /// A setting, `key=value`, that holds from the next start on.
    pub fn set(&mut self, setting: &str) {
        self.plan.settings.push(setting.to_owned());
    }

    /// Starts it. Returns at once: that it serves shows when it answers.
    pub fn start(&mut self) -> Result<(), Failure> {
        assert!(self.child.is_none(), "a node is started when it does not run");
        let path = self.plan.log();
        let opened = || -> std::io::Result<[fs::File; 2]> {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir)?;
            }
            let log = OpenOptions::new().create(true).append(true).open(&path)?;
            Ok([log.try_clone()?, log])
        };
        let [out, err] = opened().map_err(|error| Failure::io("write", &path, &error))?;
        let mut command = Command::new(&self.plan.program);
        command.args(self.plan.args()).stdin(Stdio::null()).stdout(out).stderr(err);
        // Ctrl-C is for whoever started it, who then ends it in its own way.
        command.process_group(0).kill_on_drop(true);
        // What is set for a node of the user's own is not meant for this one.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CORACLE_") {
                command.env_remove(name);
            }
        }
        let child = command.spawn();
        let program = &self.plan.program;
        self.child = Some(child.map_err(|error| Failure::io("start", program, &error))?);
        Ok(())
    }

    /// Whether it was started and not yet ended by us.
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Why it ended by itself, with the end of its log; `None` while it runs.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        self.child = None;
        Some(format!("it ended ({status}); its log ends with:\n{}", self.log_tail()))
    }

    /// SIGKILL, now: it is on its way when this returns. Then [`NodeProcess::reap`].
    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            // It fails only where the process has ended already.
            let _ = child.start_kill();
        }
    }

    /// Waits for the end of a node that was killed.
    pub async fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The kernel ends what SIGKILL was sent to; of a wait that fails nothing follows.
            let _ = child.wait().await;
        }
    }

    /// SIGTERM; SIGKILL when it has not ended after so long. Returns how it ended.
    pub async fn stop(&mut self, patience: Duration) -> Option<ExitStatus> {
        let mut child = self.child.take()?;
        self.signal(&child, Signal::TERM);
        if let Ok(status) = tokio::time::timeout(patience, child.wait()).await {
            return status.ok();
        }
        let _ = child.start_kill();
        child.wait().await.ok()
    }

    /// Waits until it has ended by itself; `None` when it has not after so long.
    pub async fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let status = tokio::time::timeout(patience, self.child.as_mut()?.wait()).await.ok()?;
        self.child = None;
        status.ok()
    }

    /// The last lines of its log.
    pub fn log_tail(&self) -> String {
        let read = || -> std::io::Result<String> {
            let mut log = fs::File::open(self.plan.log())?;
            let len = log.metadata()?.len();
            log.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut tail = Vec::new();
            log.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
            Ok(String::from_utf8_lossy(&tail).into_owned())
        };
        read().unwrap_or_else(|error| format!("{}: {error}", self.plan.log().display()))
    }

    fn signal(&self, child: &Child, signal: Signal) {
        // A child that is waited for keeps its id to itself: no other process can have it.
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(pid) = pid {
            let _ = kill_process(pid, signal);
        }
    }
}
