//! Text to token ids and back, by the tokenizer that lies beside a Hugging Face model.
//!
//! `tokenizer.json` is run by the `tokenizers` library, so ids equal those of `transformers`' fast tokenizers.
//! What the file does not say (begin, end and pad token, chat template) is read from the files beside it.
//! Text that spells a special token is encoded as that token, as `transformers` does; chat templates need it.

mod chat;
mod dialogue;
mod json;
mod pipeline;
mod special;

pub use chat::ChatSample;
pub use dialogue::{Dialogue, Message};

use crate::error::{Error, Result};
use crate::files;
use chat::ChatTemplate;
use serde_json::Value;
use sha2::{Digest, Sha256};
use special::{Files, SpecialTokens};
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::{Encoding, PostProcessorWrapper};

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";
/// What a model's folder may hold for its tokenizer and for generation, and what goes with a trained model. The first
/// [`READ`] are read here.
const FILES: [&str; 10] = [
    TOKENIZER,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
];
const READ: usize = 6;
/// A folder of templates beside the default one, which goes along too.
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// A prompt and what answers it, as one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// The ids of both.
    pub tokens: Vec<i64>,
    /// How many of them stand before the first that holds any of the response.
    pub prompt_len: usize,
}

/// A dialogue that the assistant ends, as a prompt and what answers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// The rendered text before the first answer that is not given.
    pub prompt: String,
    /// The ids of all.
    pub pair: Pair,
}

/// A dialogue as its template renders it, and what the assistant says in it.
struct ChatTurns {
    text: String,
    turns: Vec<chat::Turn>,
    encoding: Encoding,
    sample: ChatSample,
}

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    dir: PathBuf,
    /// Without its post-processor, which puts tokens round a sequence and cuts blanks off offsets.
    inner: tokenizers::Tokenizer,
    begin: Vec<i64>,
    special: SpecialTokens,
    vocab_size: usize,
    chat: ChatTemplate,
    warnings: Vec<String>,
    /// `tokenizer.json` and `tokenizer_config.json` for a trained model, where those that lie here say something else.
    rewritten: Option<[String; 2]>,
}

impl Tokenizer {
    /// Loads the tokenizer of the model in `model_dir`, as `transformers` 5 does: special tokens are added and the class has
    /// its say. A sequence begins with what the post-processor of `tokenizer.json` puts there, whatever `add_bos_token` in
    /// `tokenizer_config.json` says.
    ///
    /// # Errors
    /// Names the file and field that is missing or wrong.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let files = Files::read(model_dir)?;
        let path = model_dir.join(TOKENIZER);
        let bytes = std::fs::read(&path).map_err(|e| wrong(&path, &e))?;
        let (mut inner, by_class) = build(&bytes, &files).map_err(|e| wrong(&path, &e))?;
        files.add_tokens(model_dir, &mut inner)?;
        let special = files.special(model_dir, &inner)?;
        let rewritten = by_class.is_some().then(|| rewritten(&inner, files.config())).transpose()?;
        let begin = post_processor_prefix(&inner)?;
        inner.with_post_processor(None::<PostProcessorWrapper>);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let chat = ChatTemplate::read(model_dir, files.config());
        let warnings = by_class.into_iter().chain(special.warnings.clone()).collect();
        Ok(Self { dir: model_dir.to_path_buf(), inner, begin, special, vocab_size, chat, warnings, rewritten })
    }

    /// Hash of the files in `model_dir` that say how text becomes tokens: as long as it is the same, so are the tokens.
    ///
    /// # Errors
    /// Names the file that is there and cannot be read.
    pub fn fingerprint(model_dir: &Path) -> Result<[u8; 32]> {
        let mut hasher = Sha256::new();
        for name in FILES.iter().take(READ).copied().chain(["config.json"]) {
            let path = model_dir.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => {
                    hasher.update(Sha256::new().chain_update(name).chain_update(Sha256::digest(bytes)).finalize())
                }
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(wrong(&path, &e)),
            }
        }
        Ok(hasher.finalize().into())
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

    /// What is odd about the tokenizer and no error, each in a sentence.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The ids of `text`, which begins a sequence. It is not preceded by a second BOS where it spells one.
    ///
    /// # Errors
    /// Says why the text cannot be encoded.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.begun(ids(&self.inner.encode_fast(text, false).map_err(unencodable)?)))
    }

    /// The ids of a prompt, which begins a sequence. A prompt that would have none is BOS alone; it stays
    /// without ids only where the tokenizer has no BOS.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<i64>> {
        let tokens = self.encode(text)?;
        Ok(if tokens.is_empty() { self.special.bos.into_iter().collect() } else { tokens })
    }

    /// The ids of a prompt and a response, which are encoded as one text: apart, many tokenizers would put a blank before the
    /// response that no text has. A token that holds the end of the prompt and the beginning of the response counts to the
    /// response, as in the masks of `transformers`, so that nothing of it is lost.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, prompt: &str, response: &str) -> Result<Pair> {
        let encoding = self.inner.encode([prompt, response].concat(), false).map_err(unencodable)?;
        let ids = ids(&encoding);
        let of_prompt = tokens_before(&encoding, prompt.len());
        let tokens = self.begun(ids);
        let prompt_len = of_prompt + tokens.len() - encoding.len();
        match self.special.bos.filter(|_| prompt_len == 0 && prompt.is_empty()) {
            Some(bos) => Ok(Pair { tokens: [&[bos], &tokens[..]].concat(), prompt_len: 1 }),
            None => Ok(Pair { tokens, prompt_len }),
        }
    }

    /// Puts before a sequence what begins one, unless that is there.
    fn begun(&self, ids: Vec<i64>) -> Vec<i64> {
        if ids.starts_with(&self.begin) { ids } else { [self.begin.as_slice(), &ids].concat() }
    }

    /// Ends a sequence: appends the end-of-sequence token, unless the last token is one that ends.
    pub fn end(&self, tokens: &mut Vec<i64>) {
        if tokens.last().is_none_or(|last| !self.special.ends.contains(last)) {
            tokens.push(self.special.eos);
        }
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

    /// The end-of-sequence token, as sequences are written with it.
    pub fn eos(&self) -> i64 {
        self.special.eos
    }

    /// Every token that ends an answer: the tokenizer's end of sequence, and those of `generation_config.json` and
    /// `config.json`.
    pub fn ends(&self) -> Vec<i64> {
        self.special.ends.iter().copied().collect()
    }

    /// The id that fills up short rows; the end of sequence where the tokenizer has none. Rows are known by
    /// their lengths, so which id it is changes nothing.
    pub fn pad(&self) -> i64 {
        self.special.pad
    }

    /// A token that fills up short rows where a score is read at the last token that is another one: the pad token, unless
    /// sequences end with it; else one that stands for nothing, or that only begins sequences; else none.
    pub fn pad_that_ends_nothing(&self) -> Option<i64> {
        let id = |name: &str| Some(i64::from(self.inner.token_to_id(self.special.texts.get(name)?)?));
        let candidates = [Some(self.special.pad), id("unk_token"), id("mask_token"), self.special.bos];
        candidates.into_iter().flatten().find(|id| !self.special.ends.contains(id))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The text of a token, special or not.
    pub fn token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }

    /// Whether dialogues can be rendered.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_there()
    }

    /// Renders a dialogue by the model's chat template, as `apply_chat_template` of `transformers` does.
    ///
    /// # Errors
    /// If there is no template, or it refuses the dialogue.
    pub fn render_chat(&self, dialogue: &Dialogue, add_generation_prompt: bool) -> Result<String> {
        self.chat.render(dialogue, dialogue.messages.len(), add_generation_prompt, &self.special.texts)
    }

    /// Renders a dialogue with the generation prompt and encodes it: what a model is asked.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`].
    pub fn encode_chat_prompt(&self, dialogue: &Dialogue) -> Result<(String, Vec<i64>)> {
        let text = self.render_chat(dialogue, true)?;
        let tokens = ids(&self.inner.encode_fast(text.as_str(), false).map_err(unencodable)?);
        Ok((text, tokens))
    }

    /// Renders and encodes a dialogue; the assistant's turns are its targets.
    ///
    /// The rendered text is encoded whole. A turn is what the template marks by `{% generation %}`; where it marks nothing, a
    /// turn spans the text between the dialogue before it, rendered with the generation prompt, and the dialogue up to and
    /// with it. Its targets are the tokens that hold any of it, and none after its last end token (ChatML's line break after
    /// `<|im_end|>`). Where the dialogue ends with an assistant's turn without an end token, one is appended, or the model
    /// would not learn to stop.
    ///
    /// # Errors
    /// As [`Tokenizer::render_chat`], and where a dialogue's beginning is not rendered as the beginning of its rendering.
    pub fn encode_chat(&self, dialogue: &Dialogue) -> Result<ChatSample> {
        Ok(self.chat_turns(dialogue)?.sample)
    }

    fn chat_turns(&self, dialogue: &Dialogue) -> Result<ChatTurns> {
        let ends: Vec<String> = self.special.ends.iter().filter_map(|&id| self.token(id)).collect();
        let (text, turns) = self.chat.turns(dialogue, &self.special.texts, &ends)?;
        let encoding = self.inner.encode(text.as_str(), false).map_err(unencodable)?;
        let mut sample = ChatSample::new(ids(&encoding), encoding.get_offsets(), &turns, &self.special.ends);
        if let Some(last) = dialogue.messages.last().filter(|m| m.is_assistant()) {
            sample.end_with(self.special.eos, &self.special.ends, last.learnt);
        }
        Ok(ChatTurns { text, turns, encoding, sample })
    }

    /// Renders and encodes a dialogue that the assistant ends, up to the end of what it says last: as a rollout leaves it,
    /// without what a template writes after that. Its first `given` messages are the prompt, and with them whatever else stands
    /// before the first answer after them.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_chat`].
    pub fn encode_answered(&self, dialogue: &Dialogue, given: usize) -> Result<Answered> {
        let ChatTurns { text, turns, encoding, mut sample } = self.chat_turns(dialogue)?;
        let said = sample.target.iter().zip(&sample.muted).rposition(|(target, muted)| *target || *muted);
        let last = said.unwrap_or_default();
        // A template may mark an answer without its end.
        let end = sample.tokens[last..].iter().position(|t| self.special.ends.contains(t));
        sample.tokens.truncate(last + end.unwrap_or_default() + 1);
        let before = dialogue.messages.iter().take(given).filter(|m| m.is_assistant()).count();
        let start = turns.get(before).or(turns.last()).map_or(0, |turn| turn.span.start);
        let prompt_len = tokens_before(&encoding, start).min(sample.tokens.len());
        Ok(Answered { prompt: text[..start].into(), pair: Pair { tokens: sample.tokens, prompt_len } })
    }

    /// Copies the tokenizer's files into the folder `to`, as the model was trained with them; with `pad` as the pad token where
    /// that is given.
    ///
    /// # Errors
    /// Names the path that cannot be read or written.
    pub fn copy_files(&self, to: &Path, pad: Option<i64>) -> Result<()> {
        for name in FILES {
            copy_file(&self.dir.join(name), &to.join(name), name == TOKENIZER)?;
        }
        if let Ok(entries) = std::fs::read_dir(self.dir.join(MORE_TEMPLATES)) {
            files::make_dir(&to.join(MORE_TEMPLATES))?;
            for entry in entries {
                let from = entry.map_err(|e| Error::storage(&self.dir.join(MORE_TEMPLATES), e))?.path();
                let Some(name) = from.file_name().filter(|_| from.is_file()) else { continue };
                copy_file(&from, &to.join(MORE_TEMPLATES).join(name), true)?;
            }
        }
        if let Some([tokenizer, config]) = &self.rewritten {
            files::write(&to.join(TOKENIZER), tokenizer.as_bytes())?;
            files::write(&to.join(CONFIG), config.as_bytes())?;
        }
        match pad.filter(|pad| *pad != self.special.pad).and_then(|pad| self.token(pad)) {
            Some(text) => name_pad(to, &text),
            None => Ok(()),
        }
    }
}

/// Names the pad token in the tokenizer's files in a folder.
fn name_pad(dir: &Path, text: &str) -> Result<()> {
    for (name, must) in [(CONFIG, true), ("special_tokens_map.json", false)] {
        let path = dir.join(name);
        if !must && !path.exists() {
            continue;
        }
        let mut fields = special::read_object(&path)?;
        fields.insert("pad_token".into(), text.into());
        let bytes = serde_json::to_vec_pretty(&fields).map_err(|e| Error::bug(e.to_string()))?;
        files::write(&path, &bytes)?;
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path, must: bool) -> Result<()> {
    match std::fs::read(from) {
        Ok(bytes) => files::write(to, &bytes),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !must => Ok(()),
        Err(e) => Err(Error::storage(from, e)),
    }
}

/// The bytes of a text that some tokens hold, as ranges of tokens: those that overlap `span`.
fn overlapping(offsets: &[(usize, usize)], span: &Range<usize>) -> Option<Range<usize>> {
    let holds = |&(start, end): &(usize, usize)| start < span.end && end > span.start;
    let first = offsets.iter().position(holds)?;
    let length = offsets[first..].iter().take_while(|o| holds(o)).count();
    Some(first..first + length)
}

/// How many tokens stand before the first that holds any of the text from byte `start` on.
fn tokens_before(encoding: &Encoding, start: usize) -> usize {
    encoding.get_offsets().iter().position(|&(_, end)| end > start).unwrap_or(encoding.len())
}

fn ids(encoding: &Encoding) -> Vec<i64> {
    encoding.get_ids().iter().map(|&id| i64::from(id)).collect()
}

fn unencodable(error: tokenizers::Error) -> Error {
    Error::input(format!("the tokenizer cannot encode this text: {error}"))
}

fn wrong(path: &Path, what: &dyn std::fmt::Display) -> Error {
    Error::input(format!(
        "{}: {what}; a model folder holds the tokenizer as tokenizer.json (save_pretrained of a fast tokenizer in transformers writes it)",
        path.display()
    ))
}

/// The tokenizer of `tokenizer.json` as its class has it, and what is to be said of that. Cutting and padding that it may ask
/// for are switched off: both are the data loaders' work.
fn build(
    bytes: &[u8],
    files: &Files,
) -> std::result::Result<(tokenizers::Tokenizer, Option<String>), tokenizers::Error> {
    let mut by_class = None;
    let mut inner: tokenizers::Tokenizer = if pipeline::has_class(files.config(), files.model()) {
        let mut json: Value = serde_json::from_slice(bytes)?;
        by_class = pipeline::apply_class(&mut json, files.config(), files.model());
        serde_json::from_value(json)?
    } else {
        tokenizers::Tokenizer::from_bytes(bytes)?
    };
    inner.with_truncation(None)?;
    inner.with_padding(None);
    Ok((inner, by_class))
}

/// Both files as a trained model gets them: the tokenizer that was used, and a class that keeps it.
fn rewritten(inner: &tokenizers::Tokenizer, config: &serde_json::Map<String, Value>) -> Result<[String; 2]> {
    let bug = |e: &dyn std::fmt::Display| Error::bug(format!("writing the tokenizer: {e}"));
    let mut config = config.clone();
    config.insert("tokenizer_class".into(), pipeline::GENERIC.into());
    let tokenizer = inner.to_string(true).map_err(|e| bug(&e))?;
    Ok([tokenizer, serde_json::to_string_pretty(&config).map_err(|e| bug(&e))?])
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
