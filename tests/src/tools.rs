//! Where things are, and the command-line programs that users have.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in a folder of the repository").into()
}

/// What scripts and tests make.
pub fn cache() -> PathBuf {
    root().join(".cache")
}

/// The administrator's kubeconfig of the test cluster. Never the user's own: these tests uninstall things.
pub fn kubeconfig() -> PathBuf {
    cache().join("cluster/admin.conf")
}

/// What a program answered.
pub struct Answer {
    /// Whether it ended well.
    pub ok: bool,
    /// Its standard output.
    pub output: String,
    /// Its standard error: warnings, and why it failed.
    pub errors: String,
}

impl Answer {
    /// The output of a program that must end well.
    pub fn good(self) -> String {
        assert!(self.ok, "{}", self.errors);
        self.output
    }
}

/// Runs `kubectl`.
pub async fn kubectl(args: &[&str]) -> Answer {
    run("kubectl", args, None).await
}

/// Runs `kubectl` with a manifest on its standard input.
pub async fn kubectl_with(args: &[&str], manifest: &serde_json::Value) -> Answer {
    run("kubectl", args, Some(manifest.to_string())).await
}

/// Runs `helm`.
pub async fn helm(args: &[&str]) -> Answer {
    run("helm", args, None).await
}

/// Runs `helm` with values on its standard input.
pub async fn helm_with(args: &[&str], values: &serde_json::Value) -> Answer {
    run("helm", args, Some(values.to_string())).await
}

async fn run(program: &str, args: &[&str], input: Option<String>) -> Answer {
    let path = cache().join("bin").join(program);
    let mut command = Command::new(&path);
    command
        .args(args)
        .env("KUBECONFIG", kubeconfig())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child =
        command.spawn().unwrap_or_else(|e| panic!("{}: {e}; tests/cluster/kubebox.sh makes it", path.display()));
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(input.unwrap_or_default().as_bytes()).await.unwrap_or_else(|e| panic!("{program}: {e}"));
    drop(stdin);
    let Output { status, stdout, stderr } = child.wait_with_output().await.unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Answer { ok: status.success(), output: text(&stdout), errors: text(&stderr) }
}

/// The one row of a table that `kubectl get` printed, by column. Cells stand under their heads, so an empty one shows.
pub fn row(table: &str) -> std::collections::BTreeMap<String, String> {
    let lines: Vec<&str> = table.lines().collect();
    let [head, row] = lines[..] else { panic!("expected a head and one row:\n{table}") };
    let starts: Vec<usize> = head
        .match_indices(|c: char| !c.is_whitespace())
        .map(|(i, _)| i)
        .filter(|&i| i == 0 || head.as_bytes()[i - 1] == b' ')
        .collect();
    let cell = |line: &str, n: usize| {
        let end = starts.get(n + 1).copied().unwrap_or(line.len()).min(line.len());
        line.get(starts[n]..end).unwrap_or_default().trim().to_owned()
    };
    (0..starts.len()).map(|n| (cell(head, n), cell(row, n))).collect()
}

#[cfg(test)]
mod tests {
    use super::row;

    #[test]
    fn an_empty_cell_of_a_table_is_seen() {
        let row = row("NAME   STAGE   AGE\ndemo           5s\n");
        assert_eq!((row["NAME"].as_str(), row["STAGE"].as_str(), row["AGE"].as_str()), ("demo", "", "5s"));
    }
}
