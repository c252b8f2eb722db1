//! Text to token ids and back, by the tokenizer that lies beside a Hugging Face model.
//!
//! `tokenizer.json` is run by the `tokenizers` library, so ids equal those of `transformers`' fast tokenizers.
//! What the file does not say (begin, end and pad token, chat template) is read from the files beside it.
//! Text that spells a special token is encoded as that token, as `transformers` does; chat templates need it.

mod chat;
mod special;

pub use chat::{ChatSample, Message};

use crate::error::{Error, Result};
use crate::files;
use chat::ChatTemplate;
use special::SpecialTokens;
use std::path::{Path, PathBuf};
use tokenizers::Encoding;

const TOKENIZER: &str = "tokenizer.json";
/// What a model's folder may hold for its tokenizer and for generation, and what goes with a trained model.
const FILES: [&str; 10] = [
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
];

/// Whether a text begins a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It does: what the tokenizer puts before a sequence is put before it.
    Yes,
    /// It continues one.
    No,
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    dir: PathBuf,
    inner: tokenizers::Tokenizer,
    begin: Vec<i64>,
    special: SpecialTokens,
    vocab_size: usize,
    chat: ChatTemplate,
}

impl Tokenizer {
    /// Loads the tokenizer of the model in `model_dir`.
    ///
    /// A sequence begins with BOS where `add_bos_token` in `tokenizer_config.json` says so; where that is silent,
    /// with what the post-processor of `tokenizer.json` puts there.
    ///
    /// # Errors
    /// Names the file and field that is missing or wrong.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let inner = read_tokenizer(&model_dir.join(TOKENIZER))?;
        let (special, config) = special::read(model_dir, &inner)?;
        let begin = match config.get("add_bos_token").and_then(serde_json::Value::as_bool) {
            Some(true) => vec![special.bos.ok_or_else(|| {
                Error::input(format!("{}: add_bos_token is true, but no bos_token is named", model_dir.display()))
            })?],
            Some(false) => Vec::new(),
            None => post_processor_prefix(&inner)?,
        };
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let chat = ChatTemplate::read(model_dir, &config);
        Ok(Self { dir: model_dir.to_path_buf(), inner, begin, special, vocab_size, chat })
    }

    /// What this tokenizer does otherwise than another, if it does: ids that one model's tokens have are then others in the
    /// other model.
    ///
    /// # Errors
    /// A bug: a tokenizer that cannot be written.
    pub fn difference(&self, other: &Self) -> Result<Option<String>> {
        let tokens = |of: &Self| -> std::collections::BTreeMap<u32, String> {
            of.inner.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect()
        };
        let (here, there) = (tokens(self), tokens(other));
        let named = |token: Option<&String>| token.map_or("nothing".into(), |token| format!("{token:?}"));
        let ids = here.keys().chain(there.keys());
        if let Some(id) = ids.filter(|id| here.get(id) != there.get(id)).min() {
            return Ok(Some(format!("id {id} is {} here and {} there", named(here.get(id)), named(there.get(id)))));
        }
        let special = |of: &Self| (of.special.eos, of.special.bos, of.begin.clone());
        if special(self) != special(other) {
            return Ok(Some("its beginning or end of a sequence is another token".into()));
        }
        let parts = |of: &Self| -> Result<serde_json::Value> {
            let text = of.inner.to_string(false).map_err(|e| Error::bug(e.to_string()))?;
            serde_json::from_str(&text).map_err(|e| Error::bug(e.to_string()))
        };
        let (here, there) = (parts(self)?, parts(other)?);
        let part = ["model", "normalizer", "pre_tokenizer"].into_iter().find(|part| here.get(part) != there.get(part));
        Ok(part.map(|part| format!("'{part}' in tokenizer.json is another")))
    }

    /// The ids of `text`. It is not preceded by a second BOS where it spells one.
    ///
    /// # Errors
    /// Says why the text cannot be encoded.
    pub fn encode(&self, text: &str, begin: Begin) -> Result<Vec<i64>> {
        let ids = ids(&self.inner.encode_fast(text, false).map_err(unencodable)?);
        let missing = begin == Begin::Yes && !ids.starts_with(&self.begin);
        Ok(if missing { [self.begin.as_slice(), &ids].concat() } else { ids })
    }

    /// The ids of a prompt, which begins a sequence. A prompt that would have none is BOS alone; it stays
    /// without ids only where the tokenizer has no BOS.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<i64>> {
        let tokens = self.encode(text, Begin::Yes)?;
        Ok(if tokens.is_empty() { self.special.bos.into_iter().collect() } else { tokens })
    }

    /// The text of `tokens`, special tokens left out.
    ///
    /// # Errors
    /// If an id is negative or has more than 32 bits, or the decoder fails.
    pub fn decode(&self, tokens: &[i64]) -> Result<String> {
        let ids: std::result::Result<Vec<u32>, _> = tokens.iter().map(|&id| u32::try_from(id)).collect();
        let ids =
            ids.map_err(|_| Error::bug(format!("token ids must be 0 to {}, but some are not: {tokens:?}", u32::MAX)))?;
        self.inner.decode(&ids, true).map_err(|e| Error::bug(format!("cannot decode token ids: {e}")))
    }

    /// How many ids [`Tokenizer::encode`] puts before a sequence.
    pub fn begin_length(&self) -> usize {
        self.begin.len()
    }

    /// The beginning-of-sequence token, where there is one.
    pub fn bos(&self) -> Option<i64> {
        self.special.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> i64 {
        self.special.eos
    }

    /// The id that fills up short rows; the end of sequence where the tokenizer has none. Rows are known by
    /// their lengths, so which id it is changes nothing.
    pub fn pad(&self) -> i64 {
        self.special.pad
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Renders a dialogue by the model's chat template, as `apply_chat_template` of `transformers` does.
    ///
    /// # Errors
    /// If there is no template, or it refuses the dialogue.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.chat.render(messages, add_generation_prompt, &self.special.texts)
    }

    /// Renders and encodes a dialogue; the assistant's turns are its targets.
    ///
    /// The rendered text is encoded whole. A turn spans the text between the dialogue before it, rendered with the generation
    /// prompt, and the dialogue up to and with it; its targets are the tokens that begin in the span, and none
    /// after its last EOS (ChatML's line break after `<|im_end|>`). Where the dialogue ends with an assistant's turn without
    /// EOS, one is appended, or the model would not learn to stop.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`], and where a dialogue's beginning is not rendered as the beginning of its rendering.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<ChatSample> {
        let (text, spans) = self.chat.assistant_spans(messages, &self.special.texts)?;
        let encoding = self.inner.encode(text.as_str(), false).map_err(unencodable)?;
        let mut sample = ChatSample::new(ids(&encoding), encoding.get_offsets(), &spans, self.special.eos);
        if messages.last().is_some_and(Message::is_assistant) {
            sample.end_with(self.special.eos);
        }
        Ok(sample)
    }

    /// Copies the tokenizer's files into the folder `to`.
    ///
    /// # Errors
    /// Names the path that cannot be read or written.
    pub fn copy_files(&self, to: &Path) -> Result<()> {
        for name in FILES {
            let from = self.dir.join(name);
            match std::fs::read(&from) {
                Ok(bytes) => files::write(&to.join(name), &bytes)?,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && name != TOKENIZER => {}
                Err(e) => return Err(Error::storage(&from, e)),
            }
        }
        Ok(())
    }
}

fn ids(encoding: &Encoding) -> Vec<i64> {
    encoding.get_ids().iter().map(|&id| i64::from(id)).collect()
}

fn unencodable(error: tokenizers::Error) -> Error {
    Error::input(format!("the tokenizer cannot encode this text: {error}"))
}

/// Reads `tokenizer.json`. Cutting and padding that it may ask for are switched off: both are the data loaders' work.
fn read_tokenizer(path: &Path) -> Result<tokenizers::Tokenizer> {
    let wrong = |e: &dyn std::fmt::Display| {
        Error::input(format!(
            "{}: {e}; a model folder holds the tokenizer as tokenizer.json (save_pretrained of a fast tokenizer in transformers writes it)",
            path.display()
        ))
    };
    let bytes = std::fs::read(path).map_err(|e| wrong(&e))?;
    let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| wrong(&e))?;
    inner.with_truncation(None).map_err(|e| wrong(&e))?;
    inner.with_padding(None);
    Ok(inner)
}

/// What the post-processor puts before a sequence, seen on a text of one letter.
fn post_processor_prefix(inner: &tokenizers::Tokenizer) -> Result<Vec<i64>> {
    let plain = ids(&inner.encode("a", false).map_err(unencodable)?);
    let processed = ids(&inner.encode("a", true).map_err(unencodable)?);
    let length = processed.windows(plain.len().max(1)).position(|w| w == plain).unwrap_or(0);
    Ok(processed[..length].to_vec())
}

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;
