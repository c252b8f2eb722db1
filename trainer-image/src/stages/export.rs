//! What a stage leaves: its model in Hugging Face layout and, where it was trained by adapters, these beside it.
//!
//! The model goes to disk segment by segment (all ranks bring a segment to rank 0, which writes it while the others wait), so
//! that a host needs no more room for it than for one segment and the adapters, whatever the model's size.

use super::context::Context;
use crate::engine::{Model, SegmentValues};
use crate::error::{Error, Result};
use crate::files;
use crate::model::{
    Adapters, Format, HeadKind, ModelWriter, ScoreNormalisation, Scores, Segment, Source, write_adapters,
};
use crate::tokenizer::Tokenizer;
use std::path::{Path, PathBuf};

/// Writes the trained model with the job's tokenizer, and the adapters. Every rank calls it.
pub(super) fn write(
    context: &Context,
    model: &Model,
    source: &Source,
    score: Option<ScoreNormalisation>,
) -> Result<()> {
    let paths = &context.config.paths;
    let (path, base_model, head) = (context.path(&paths.output), context.path(&paths.base_model), model.head_kind());
    let beside = adapter_dir(&path);
    let lease = context.lease();
    let format = Format::asked(&context.config.export, source.kind)?;
    let mut writer = None;
    context.group.while_first(|| {
        writer = Some(ModelWriter::create(&path, source, head, format, &lease)?);
        Ok(())
    })?;
    let mut adapters = model.lora().map(|lora| Adapters { lora: lora.clone(), blocks: vec![] });
    let mut trained_head = None;
    model.parameters(source, |SegmentValues { segment, values, adapters: of_block }| {
        if let Some(adapters) = &mut adapters {
            adapters.blocks.extend(of_block);
        }
        writer.as_mut().map_or(Ok(()), |writer| writer.write(segment, &values))?;
        if segment == Segment::Head && head == HeadKind::Scalar {
            trained_head = Some(values);
        }
        Ok(())
    })?;
    context.group.while_first(move || {
        let tokenizer = Tokenizer::load(&base_model)?;
        let writer = writer.ok_or_else(|| Error::bug("a model is finished before it is begun"))?;
        let pad = (head == HeadKind::Scalar).then(|| tokenizer.pad_that_ends_nothing()).flatten();
        let about = Scores { normalisation: score, pad };
        writer.finish(about, |dir| tokenizer.copy_files(dir, pad))?;
        lease.check()?;
        // Only then, so that no adapters lie beside a model that is not theirs.
        match adapters {
            None => files::remove_dir(&beside),
            Some(adapters) => {
                write_adapters(&beside, &adapters, source, &paths.start_model, trained_head.as_deref(), &lease)
            }
        }
    })
}

/// Where the adapters lie with which the model in `model` was trained.
pub(super) fn adapter_dir(model: &Path) -> PathBuf {
    model.with_file_name("adapter")
}
