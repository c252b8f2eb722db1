//! A file at a web address, which is what it should be when it has the hash that the job says.

use super::client::{Asked, Client};
use super::origin::{Check, Fault, File, Listing, Opened, Origin};

/// A web address.
pub(super) struct Web {
    client: Client,
    asked: Asked,
    url: String,
    sha256: String,
    name: String,
}

impl Web {
    pub fn new(client: &Client, url: &str, sha256: &str, name: String) -> Self {
        let asked = Asked::new(None, None, "the server");
        Self { client: client.clone(), asked, url: url.into(), sha256: sha256.into(), name }
    }
}

impl Origin for Web {
    fn server(&self) -> &str {
        ""
    }

    fn list(&self, _: Option<&str>) -> Result<Listing, Fault> {
        let size = self.client.size(&self.url, &self.asked)?;
        let check = Check::Sha256(self.sha256.clone());
        let file = File { name: self.name.clone(), key: self.url.clone(), size, check };
        Ok(Listing { revision: self.sha256.clone(), files: vec![file] })
    }

    fn open(&self, file: &File, from: u64) -> Result<Opened, Fault> {
        self.client.open(&file.key, &self.asked, from)
    }
}
