//! One test's part of the cluster, and how a test waits for and looks at what is in it.

use crate::SYSTEM;
use crate::manifest::Manifest;
use crate::operator::Operator;
use crate::report;
use crate::volume::Volume;
use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, PersistentVolume, PersistentVolumeClaim, Pod, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, ListParams, LogParams, Patch, PatchParams, PostParams, Request,
};
use kube::runtime::wait::{Condition, await_condition};
use kube::runtime::watcher::watch_object;
use kube::{Api, Client, Resource, ResourceExt};
use rlhf_api::job::{Phase, RLHFJob, RLHFJobStatus, StagePhase, StageStatus};
use rlhf_api::names;
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::cell::{Cell, RefCell};
use std::fmt::Debug;
use std::fs;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;
use tokio::time::timeout;

/// The claim of the examples.
const CLAIM: &str = "rlhf-data";
/// The label by which jobs choose an operator.
const CLASS: &str = "rlhf.dev/class";
/// How often a condition is looked at that no watch tells of.
const POLL: Duration = Duration::from_millis(200);
/// When a wait is given up. It only ends what hangs, however slow the machine is and whatever runs beside.
const TOO_LONG: Duration = Duration::from_secs(300);

/// A namespace with a volume.
pub struct Scene {
    /// The API server, as its administrator.
    pub client: Client,
    /// The namespace, which has the test's name.
    pub namespace: String,
    /// The volume behind the claim of the examples.
    pub volume: Volume,
    /// The operator that minds the namespace.
    pub operator: Operator,
}

/// An event about a job.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Told {
    /// Its reason.
    pub reason: String,
    /// The child that it concerns.
    pub about: Option<String>,
    /// How often it was told.
    pub times: i32,
}

/// The version of a job, and its status.
type State = (Option<String>, RLHFJobStatus);

/// Every state of a job that the API server told of, from the time it was made.
pub struct History {
    seen: Rc<RefCell<Vec<State>>>,
    task: AbortHandle,
}

impl History {
    /// Whether there was a state like this.
    pub fn had(&self, wanted: impl Fn(&RLHFJobStatus) -> bool) -> bool {
        self.seen.borrow().iter().any(|(_, status)| wanted(status))
    }

    /// Whether each state of it was another than the one before.
    pub fn each_differs_from_the_one_before(&self) -> bool {
        self.seen.borrow().windows(2).all(|pair| pair[0].1 != pair[1].1)
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A stage of a job's status, or prepare.
pub fn stage(job: &RLHFJob, name: &str) -> StageStatus {
    job.status.as_ref().and_then(|s| s.slot(name)).cloned().unwrap_or_default()
}

/// The name of the Job of a job's attempt at a stage.
pub fn attempt(job: &RLHFJob, of: &str, attempt: u32) -> String {
    names::attempt(&job.name_any(), &uid(job), of, attempt)
}

/// The UID of a stored job.
pub fn uid(job: &RLHFJob) -> String {
    job.uid().expect("a stored job has a UID")
}

/// A condition of a job, as status, reason and message.
pub fn condition(job: &RLHFJob, kind: &str) -> Option<(String, String, String)> {
    let conditions = &job.status.as_ref()?.conditions;
    conditions.iter().find(|c| c.type_ == kind).map(|c| (c.status.clone(), c.reason.clone(), c.message.clone()))
}

impl Scene {
    /// A fresh namespace and volume, and the place of an operator.
    pub(crate) async fn new(client: Client, name: &str, operator: Operator) -> Self {
        assert!(name.len().max(operator.namespace.len()) <= 63, "{name} is too long for a namespace");
        let scene = Self { client, namespace: name.into(), volume: Volume::new(name), operator };
        scene.clear().await;
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let namespace = json!({"metadata": {"name": name, "labels": labels}});
        scene.create(&Api::<Namespace>::all(scene.client.clone()), namespace).await;
        scene.make_volume().await;
        let accounts = scene.api::<ServiceAccount>();
        scene.await_object(&accounts, "default", |a: Option<&ServiceAccount>| a.is_some()).await;
        scene
    }

    async fn make_volume(&self) {
        let Self { namespace, volume, .. } = self;
        let spec = json!({"accessModes": ["ReadWriteMany"], "storageClassName": ""});
        let mut persistent = spec.clone();
        persistent["capacity"] = json!({"storage": "1Gi"});
        persistent["hostPath"] = json!({"path": volume.path(), "type": "Directory"});
        persistent["claimRef"] = json!({"namespace": namespace, "name": CLAIM});
        let mut claim = spec;
        claim["resources"] = json!({"requests": {"storage": "1Gi"}});
        claim["volumeName"] = json!(namespace);
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        self.create(&volumes, json!({"metadata": {"name": namespace}, "spec": persistent})).await;
        self.create(&self.api::<PersistentVolumeClaim>(), json!({"metadata": {"name": CLAIM}, "spec": claim})).await;
    }

    async fn create<K>(&self, api: &Api<K>, object: Value)
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + serde::Serialize,
    {
        let object: K = serde_json::from_value(object).expect("the harness writes valid objects");
        api.create(&PostParams::default(), &object).await.unwrap_or_else(|e| panic!("{}: {e}", object.name_any()));
    }

    /// Takes away what an earlier run left.
    async fn clear(&self) {
        let namespaces = Api::<Namespace>::all(self.client.clone());
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        delete(&namespaces, &self.namespace).await;
        self.await_object(&namespaces, &self.namespace, |n: Option<&Namespace>| n.is_none()).await;
        delete(&volumes, &self.namespace).await;
        self.await_object(&volumes, &self.namespace, |v: Option<&PersistentVolume>| v.is_none()).await;
    }

    /// Takes everything away. It waits for the pods, which the next test must not meet, but not for the namespace:
    /// Kubernetes looks only now and then whether one is empty.
    pub(crate) async fn leave(self) {
        let all = ListParams::default();
        match self.api::<RLHFJob>().delete_collection(&DeleteParams::default(), &all).await {
            Err(kube::Error::Api(status)) if status.code == 404 => {} // the definition is gone, and so are the jobs
            deleted => drop(deleted.unwrap_or_else(|e| panic!("the RLHFJobs of {}: {e}", self.namespace))),
        }
        let jobs = self.api::<Job>();
        let left = jobs.list(&all).await.unwrap_or_else(|e| panic!("the Jobs of {}: {e}", self.namespace));
        for of_test in left.iter().filter(|j| j.owner_references().is_empty()) {
            delete(&jobs, &of_test.name_any()).await;
        }
        let pods = self.api::<Pod>();
        let left = pods.list(&all).await.unwrap_or_else(|e| panic!("the pods of {}: {e}", self.namespace));
        for of_test in left.iter().filter(|p| p.owner_references().is_empty()) {
            delete(&pods, &of_test.name_any()).await;
        }
        eventually("the end of the pods", async || pods.list(&all).await.is_ok_and(|p| p.items.is_empty())).await;
        if self.operator.namespace != SYSTEM {
            self.operator.uninstall().await;
            delete(&Api::<Namespace>::all(self.client.clone()), &self.operator.namespace).await;
        }
        delete(&Api::<Namespace>::all(self.client.clone()), &self.namespace).await;
        delete(&Api::<PersistentVolume>::all(self.client.clone()), &self.namespace).await;
        self.volume.remove();
    }

    /// What is known about the scene, for a test that failed.
    pub(crate) async fn report(&self) {
        report::print(self).await;
    }

    /// The API of a kind in this namespace.
    pub fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Applies a job as a user's manifest, without the defaults that Rust types would add.
    pub async fn apply(&self, manifest: Manifest) -> RLHFJob {
        let mut object: DynamicObject = serde_json::from_value(manifest.0).expect("a manifest is an object");
        let class = self.operator.class.clone().map(|class| (CLASS.to_owned(), class));
        object.labels_mut().extend(class);
        let kind = ApiResource::erase::<RLHFJob>(&());
        let api = Api::<DynamicObject>::namespaced_with(self.client.clone(), &self.namespace, &kind);
        let made =
            api.create(&PostParams::default(), &object).await.unwrap_or_else(|e| panic!("the job is refused: {e}"));
        self.job(&made.name_any()).await
    }

    /// What the API server says to a manifest, as strictly as `kubectl apply` asks it, without keeping anything; `over`
    /// names the stored job that it would change.
    pub async fn ask(&self, manifest: &Value, over: Option<&str>) -> Result<(), String> {
        let requests = Request::new(RLHFJob::url_path(&(), Some(&self.namespace)));
        let params = PostParams { dry_run: true, ..PostParams::default() };
        let mut manifest = manifest.clone();
        loop {
            let request = match over {
                None => requests.create(&params, manifest.to_string().into_bytes()),
                Some(stored) => {
                    manifest["metadata"]["resourceVersion"] = json!(self.job(stored).await.resource_version());
                    requests.replace(stored, &params, manifest.to_string().into_bytes())
                }
            };
            let mut request = request.expect("a request");
            *request.uri_mut() = format!("{}&fieldValidation=Strict", request.uri()).parse().expect("an address");
            match self.client.request::<Value>(request).await {
                Ok(_) => return Ok(()),
                // The operator has written its status meanwhile.
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(kube::Error::Api(status)) => return Err(status.message.clone()),
                Err(other) => panic!("the API server does not answer: {other}"),
            }
        }
    }

    /// The job as it is now.
    pub async fn job(&self, name: &str) -> RLHFJob {
        self.api::<RLHFJob>().get(name).await.unwrap_or_else(|e| panic!("RLHFJob {name}: {e}"))
    }

    /// Changes a job by a merge patch.
    pub async fn patch(&self, name: &str, change: Value) {
        let patched = self.api::<RLHFJob>().patch(name, &PatchParams::default(), &Patch::Merge(change)).await;
        patched.unwrap_or_else(|e| panic!("RLHFJob {name}: {e}"));
    }

    /// Begins to note every state of a job.
    pub fn follow(&self, name: &str) -> History {
        let seen = Rc::new(RefCell::new(Vec::<State>::new()));
        let (notes, states) = (seen.clone(), watch_object(self.api::<RLHFJob>(), name));
        let note = states.for_each(move |state| {
            let job: Option<RLHFJob> = state.ok().flatten();
            let state = job.and_then(|job| Some((job.resource_version(), job.status?)));
            let mut notes = notes.borrow_mut();
            // A watch that is begun anew tells the last state again.
            let last = notes.last().and_then(|(version, _)| version.clone());
            notes.extend(state.filter(|(version, _)| last.is_none() || *version != last));
            std::future::ready(())
        });
        History { seen, task: tokio::task::spawn_local(note).abort_handle() }
    }

    /// Waits for a condition of a job. A busy API server may have forgotten the state from which a watch is to go on.
    async fn await_either(&self, name: &str, holds: impl Fn(Option<&RLHFJob>) -> bool) -> RLHFJob {
        loop {
            match await_condition(self.api::<RLHFJob>(), name, &holds).await {
                Ok(job) => return job.expect("the condition asks for a job"),
                Err(e) if e.to_string().contains("too old resource version") => {}
                Err(e) => panic!("RLHFJob {name}: {e}"),
            }
        }
    }

    /// Waits until a job is as wanted. It fails at once when the job ends in another way.
    pub async fn await_job(&self, name: &str, what: &str, wanted: impl Fn(&RLHFJob) -> bool) -> RLHFJob {
        let ended = |job: &RLHFJob| job.status.as_ref().is_some_and(|s| s.phase.is_terminal());
        let either = |job: Option<&RLHFJob>| job.is_some_and(|job| wanted(job) || ended(job));
        let found = timeout(TOO_LONG, self.await_either(name, either)).await;
        let job = found.unwrap_or_else(|_| panic!("{what} did not come within {} s", TOO_LONG.as_secs()));
        let status = job.status.clone().unwrap_or_default();
        assert!(
            wanted(&job),
            "the job ended before {what} came: {:?}: {}",
            status.phase,
            status.message.unwrap_or_default()
        );
        job
    }

    /// Waits until a job is in a phase.
    pub async fn await_phase(&self, name: &str, phase: Phase) -> RLHFJob {
        let is = |job: &RLHFJob| job.status.as_ref().is_some_and(|s| s.phase == phase);
        self.await_job(name, &format!("{phase:?}"), is).await
    }

    /// Waits until a condition holds for a reason, and gives its message.
    pub async fn await_reason(&self, name: &str, kind: &str, reason: &str) -> String {
        let holds = |j: &RLHFJob| condition(j, kind).is_some_and(|(status, why, _)| status == "True" && why == reason);
        let job = self.await_job(name, &format!("{kind} for {reason}"), holds).await;
        condition(&job, kind).map(|(_, _, message)| message).unwrap_or_default()
    }

    /// Waits until a stage of a job is in a phase.
    pub async fn await_stage(&self, name: &str, of: &str, phase: StagePhase) -> RLHFJob {
        self.await_job(name, &format!("{of} {phase:?}"), |job| stage(job, of).phase == phase).await
    }

    /// Waits until an attempt at a stage of a job runs.
    pub async fn await_attempt(&self, name: &str, of: &str, number: u32) -> RLHFJob {
        let runs = |j: &RLHFJob| (stage(j, of).attempt, stage(j, of).phase) == (number, StagePhase::Running);
        self.await_job(name, &format!("attempt {number} at {of}"), runs).await
    }

    /// Waits until an object is as wanted.
    pub async fn await_object<K>(&self, api: &Api<K>, name: &str, wanted: impl Condition<K>) -> Option<K>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + Send + DeserializeOwned + 'static,
    {
        let found = timeout(TOO_LONG, await_condition(api.clone(), name, wanted)).await;
        let kind = K::kind(&());
        let found = found.unwrap_or_else(|_| panic!("{kind} {name} is not as wanted after {} s", TOO_LONG.as_secs()));
        found.unwrap_or_else(|e| panic!("{kind} {name}: {e}"))
    }

    /// Waits until a stage has made a step.
    pub async fn await_step(&self, job: &RLHFJob, of: &str, step: u64) {
        let made = async || self.volume.steps(job, of).iter().any(|s| s.step >= step);
        eventually(&format!("step {step} of {of}"), made).await;
    }

    /// Waits until a stage has made so many steps more than it had.
    pub async fn await_more_steps(&self, job: &RLHFJob, of: &str, more: u64) {
        let last = self.volume.steps(job, of).last().map_or(0, |s| s.step);
        self.await_step(job, of, last + more).await;
    }

    /// The pods of an attempt at a stage, by index; of several with one index the newest.
    pub async fn pods(&self, job: &RLHFJob, of: &str, attempt: u32) -> Vec<Pod> {
        let labels = [
            (names::LABEL_JOB, job.name_any()),
            (names::LABEL_STAGE, of.into()),
            (names::LABEL_ATTEMPT, attempt.to_string()),
        ];
        let selector = labels.map(|(key, value)| format!("{key}={value}")).join(",");
        let found = self.api::<Pod>().list(&ListParams::default().labels(&selector)).await;
        let mut pods = found.unwrap_or_else(|e| panic!("pods: {e}")).items;
        pods.sort_by_key(|p| (index(p), std::cmp::Reverse(p.metadata.creation_timestamp.clone())));
        pods.dedup_by_key(|p| index(p));
        pods
    }

    /// The log of a pod.
    pub async fn log(&self, pod: &Pod) -> String {
        let name = pod.name_any();
        self.api::<Pod>().logs(&name, &LogParams::default()).await.unwrap_or_else(|e| panic!("log of {name}: {e}"))
    }

    /// The step from which an attempt went on, once its rank 0 has logged it.
    pub async fn resumed_at(&self, job: &RLHFJob, of: &str, attempt: u32) -> u64 {
        let step_in = |line: &str| {
            let step = line.split_whitespace().find_map(|word| word.strip_prefix("step="));
            step.and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no step in: {line}"))
        };
        let found = Cell::new(None);
        eventually(&format!("resumption by attempt {attempt} at {of}"), async || {
            let pods = self.pods(job, of, attempt).await;
            let log = self.log(pods.first().expect("the attempt has a pod")).await;
            found.set(log.lines().find(|l| l.contains(" resumed ")).map(step_in));
            found.get().is_some()
        })
        .await;
        found.get().expect("it is there")
    }

    /// The events about a job, sorted.
    pub async fn told(&self, job: &str) -> Vec<Told> {
        let events = self.api::<Event>().list(&ListParams::default()).await.unwrap_or_else(|e| panic!("events: {e}"));
        let about = |e: &Event| {
            e.regarding.as_ref().is_some_and(|r| r.kind.as_deref() == Some("RLHFJob") && r.name.as_deref() == Some(job))
        };
        let told = |e: Event| Told {
            reason: e.reason.unwrap_or_default(),
            about: e.related.and_then(|r| r.name),
            times: e.series.map_or(1, |s| s.count),
        };
        let mut all: Vec<Told> = events.items.into_iter().filter(about).map(told).collect();
        all.sort();
        all
    }

    /// The Jobs of a job, as name and UID, sorted.
    pub async fn attempts(&self) -> Vec<(String, String)> {
        let jobs = self.api::<Job>().list(&ListParams::default()).await.unwrap_or_else(|e| panic!("Jobs: {e}"));
        let mut all: Vec<_> = jobs.iter().map(|j| (j.name_any(), j.uid().unwrap_or_default())).collect();
        all.sort();
        all
    }
}

async fn delete<K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned>(api: &Api<K>, name: &str) {
    match api.delete(name, &DeleteParams::background()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => {}
        Err(error) => panic!("{name}: {error}"),
        Ok(_) => {}
    }
}

fn index(pod: &Pod) -> u32 {
    let annotation = pod.annotations().get("batch.kubernetes.io/job-completion-index");
    annotation.and_then(|i| i.parse().ok()).unwrap_or_default()
}

/// Polls until something that no watch tells of is so.
pub async fn eventually(what: &str, holds: impl AsyncFn() -> bool) {
    let poll = async {
        while !holds().await {
            tokio::time::sleep(POLL).await;
        }
    };
    timeout(TOO_LONG, poll).await.unwrap_or_else(|_| panic!("{what} did not come within {} s", TOO_LONG.as_secs()));
}

/// Kills the one worker process of a pod with SIGKILL.
pub fn kill_worker(pod: &Pod) {
    kill(pod, process_in(pod, "worker", is_worker));
}

/// Takes a pod's processes and its runtime's shim away at once, as a node does that loses power and comes back.
pub fn lose_container(pod: &Pod) {
    let uid = pod.uid().expect("a stored pod has a UID");
    let sandbox = sandbox_of(&uid);
    let of_shim = |command: &mut Command<'_>| {
        command.next().is_some_and(|p| p.ends_with("containerd-shim-runc-v2")) && command.any(|word| word == sandbox)
    };
    let shims = processes(|_, command| of_shim(&mut command.split('\0')));
    let [shim] = shims[..] else { panic!("pod {} has shims {shims:?}, not one", pod.name_any()) };
    kill(pod, Pid::from_raw(shim).expect("0 is no shim"));
    for process in processes(|pid, _| read_of(pid, "cgroup").contains(&uid)) {
        // One that its parent's end has taken along is gone.
        let _ = kill_process(Pid::from_raw(process).expect("0 is no process of a pod"), Signal::KILL);
    }
}

/// The runtime's name for a pod, by which its shim is called.
fn sandbox_of(uid: &str) -> String {
    let folder = crate::tools::cache().join("cluster/containerd/state/io.containerd.runtime.v2.task/k8s.io");
    let folder = fs::canonicalize(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let is_of_pod = |text: &str| {
        let config: Value = serde_json::from_str(text).unwrap_or_default();
        let notes = &config["annotations"];
        notes["io.kubernetes.cri.sandbox-uid"] == uid && notes["io.kubernetes.cri.container-type"] == "sandbox"
    };
    let names: Vec<_> = entries
        .filter_map(Result::ok)
        .filter(|e| fs::read_to_string(e.path().join("config.json")).is_ok_and(|text| is_of_pod(&text)))
        .filter_map(|e| e.file_name().into_string().ok())
        .collect();
    let [name] = &names[..] else { panic!("pod {uid} has sandboxes {names:?}, not one") };
    name.clone()
}

/// Takes the memory of a pod's one worker away, until the kernel kills the worker for it.
pub fn starve_worker(pod: &Pod) {
    let worker = process_in(pod, "worker", is_worker);
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", worker.as_raw_pid())).expect("the worker runs");
    let group = groups.lines().find_map(|line| match line.splitn(3, ':').collect::<Vec<_>>()[..] {
        [_, "memory", path] => Some(format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
        ["0", "", path] if !groups.contains(":memory:") => Some(format!("/sys/fs/cgroup{path}/memory.max")),
        _ => None,
    });
    let limit = group.expect("the worker has a control group of memory");
    let runs = || fs::exists(format!("/proc/{}/stat", worker.as_raw_pid())).unwrap_or(false);
    // The first version of control groups refuses a limit below what cannot be taken away at once. So it falls by steps, and
    // rises to what the worker holds just then, which is less than it holds a moment later.
    let mut bytes: u64 = 512 << 20;
    let begun = Instant::now();
    while runs() && begun.elapsed() < TOO_LONG / 4 {
        if fs::write(&limit, bytes.to_string()).is_ok() {
            bytes = (bytes * 9 / 10).max(1 << 20);
        } else {
            std::thread::sleep(Duration::from_millis(5));
            bytes += bytes / 100;
        }
    }
}

/// Kills an operator with SIGKILL, so that it can neither end its passes nor release its lease.
pub fn kill_operator(pod: &Pod) {
    kill(pod, process_in(pod, "operator", is_operator));
}

/// Bytes of memory that an operator holds.
pub fn operator_memory(pod: &Pod) -> u64 {
    let operator = process_in(pod, "operator", is_operator);
    let status = fs::read_to_string(format!("/proc/{}/status", operator.as_raw_pid())).expect("the operator runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a process that runs has memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number of KiB") * 1024
}

/// A command line in its words.
type Command<'a> = std::str::Split<'a, char>;

fn is_operator(command: &mut Command<'_>) -> bool {
    command.next().is_some_and(|program| program.ends_with("rlhf-operator"))
}

fn is_worker(command: &mut Command<'_>) -> bool {
    command.nth(1) == Some("worker")
}

fn kill(pod: &Pod, pid: Pid) {
    kill_process(pid, Signal::KILL).unwrap_or_else(|e| panic!("process {pid:?} of {}: {e}", pod.name_any()));
}

/// The one process of a pod whose command line is as wanted. This machine is the pod's node: the process is found among
/// its own by the pod's control group.
fn process_in(pod: &Pod, what: &str, wanted: impl Fn(&mut Command<'_>) -> bool) -> Pid {
    let uid = pod.uid().expect("a stored pod has a UID");
    let found = processes(|pid, command| read_of(pid, "cgroup").contains(&uid) && wanted(&mut command.split('\0')));
    let [pid] = found[..] else { panic!("pod {} has processes {found:?} of the {what}, not one", pod.name_any()) };
    Pid::from_raw(pid).expect("0 is no process of a pod")
}

/// The processes of this machine of which number and command line are as wanted.
fn processes(wanted: impl Fn(i32, &str) -> bool) -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("/proc can be read");
    let all = all.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
    all.filter(|pid| wanted(*pid, &read_of(*pid, "cmdline"))).collect()
}

/// A file of a process. One that ends meanwhile cannot be read and is none of ours.
fn read_of(pid: i32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default()
}
