//! Adapters in the layout of PEFT, in and out: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT adapts a module, which may hold several linears in one matrix (GPT-2's `c_attn`: queries, keys and values). Here
//! each linear has adapters of its own, so such a module is written with as many times the rank: A holds their A below each
//! other, B their B along its diagonal. A module whose linears share one A, as PEFT trains it, is read too.

use super::adapters::Adapters;
use super::export::{self, Outgoing};
use super::families::{Family, HfTensor, Layout, dealt, gathered};
use super::hf::Source;
use super::tensors::{self, Location};
use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use crate::files;
use crate::lease::Lease;
use rlhf_api::stage::{Linear, Lora};
use serde_json::{Map, Value, json};
use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use tch::{Device, Kind, Tensor};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const PREFIX: &str = "base_model.model.";

/// A block's matrix in Hugging Face layout, and the linears in it.
struct Module {
    /// The name of its tensor, without `.weight`.
    name: String,
    linears: Vec<Linear>,
    layout: Layout,
}

impl Module {
    fn of_block(family: Family, spec: &ModelSpec, block: usize) -> Vec<Self> {
        let module = |entry: HfTensor| {
            let linears = entry.parts.iter().map(|p| p.as_weight()).collect::<Option<Vec<_>>>()?;
            let name = entry.name.strip_suffix(".weight")?.to_string();
            Some(Self { name, linears, layout: entry.layout })
        };
        export::stored(family, spec, Segment::Block(block), HeadKind::Lm)
            .into_iter()
            .map(|(entry, _)| entry)
            .filter_map(module)
            .collect()
    }

    /// The name without the block.
    fn kind(&self, block: usize) -> &str {
        self.name.split_once(&format!(".{block}.")).map_or(&self.name, |(_, kind)| kind)
    }

    fn key(&self, factor: char) -> String {
        format!("{PREFIX}{}.lora_{factor}.weight", self.name)
    }
}

/// The base model that the adapters in `dir` belong to, where there are some.
///
/// # Errors
/// Names the file and the field that is wrong.
pub fn base_of(dir: &Path) -> Result<Option<String>> {
    if !dir.join(CONFIG).exists() {
        return Ok(None);
    }
    let config = read_config(dir)?;
    Ok(config.get("base_model_name_or_path").and_then(Value::as_str).map(String::from))
}

/// The error of who takes the folder of adapters for that of a model, where it is one.
pub(super) fn not_a_model(dir: &Path) -> Option<Error> {
    if !dir.join(CONFIG).exists() {
        return None;
    }
    let base = base_of(dir).ok().flatten().unwrap_or_else(|| "its base".into());
    Some(Error::input(format!(
        "{}: the folder holds a PEFT adapter of '{base}' and no model; merge it (merge_and_unload() and save_pretrained() in peft) and name the merged model's folder",
        dir.display()
    )))
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::unreadable(&path, &e))?;
    serde_json::from_str(&text).map_err(|e| Error::input(format!("{}: {e}", path.display())))
}

/// Reads the adapters in `dir` for a model of this family and shape.
///
/// # Errors
/// Names the file and the field or tensor that is wrong.
pub fn read_adapters(dir: &Path, family: Family, spec: &ModelSpec) -> Result<Adapters> {
    let config = read_config(dir)?;
    let wrong = |what: String| Error::input(format!("{}: {what}", dir.join(CONFIG).display()));
    let number = |field: &str| {
        config.get(field).and_then(Value::as_f64).ok_or_else(|| wrong(format!("field '{field}' is not a number")))
    };
    for variant in ["use_rslora", "use_dora"] {
        if config.get(variant).and_then(Value::as_bool).unwrap_or(false) {
            return Err(wrong(format!("{variant} is not supported; it must be false")));
        }
    }
    let (rank, alpha, dropout) = (number("r")? as u32, number("lora_alpha")?, number("lora_dropout")?);
    let mut tensors = HashMap::new();
    tensors::locate(&dir.join(WEIGHTS), &mut tensors)?;
    let adapted = |m: &Module| tensors.contains_key(&m.key('A'));
    let targets: BTreeSet<Linear> =
        Module::of_block(family, spec, 0).into_iter().filter(adapted).flat_map(|m| m.linears).collect();
    let lora = Lora { rank, alpha: Some(alpha), dropout, targets: targets.into_iter().collect() };
    let read = |block| read_block(dir, &tensors, &Module::of_block(family, spec, block), spec, &lora);
    let blocks = (0..spec.layers).map(read).collect::<Result<_>>()?;
    Ok(Adapters { lora, blocks })
}

fn read_block(
    dir: &Path,
    tensors: &HashMap<String, Location>,
    modules: &[Module],
    spec: &ModelSpec,
    lora: &Lora,
) -> Result<Vec<Tensor>> {
    let specs = spec.adapter_params(lora);
    let mut found = HashMap::new();
    for module in modules.iter().filter(|m| m.linears.iter().all(|l| lora.targets.contains(l))) {
        let tensor = |factor| {
            let name = module.key(factor);
            let location = tensors.get(&name).ok_or_else(|| missing(dir, &name))?;
            location.copy(dir, &name)
        };
        let (a, b) = (tensor('A')?, tensor('B')?);
        let b = match module.layout {
            Layout::Heads => {
                let parts = gathered(&b, spec.heads, module.linears.len() as i64);
                Tensor::f_cat(&parts.map_err(|_| misshapen(dir, module))?, 0)?
            }
            Layout::Rows | Layout::Transposed => b,
        };
        let shape = |param| specs.iter().find(|s| s.param == param).map_or(&[][..], |s| &s.shape[..]);
        let rank = i64::from(lora.rank);
        let shared = a.size().first() == Some(&rank);
        let mut row = 0;
        for (i, linear) in (0i64..).zip(&module.linears) {
            let rows = shape(Param::LoraB(*linear)).first().copied().unwrap_or_default();
            let start = if shared { 0 } else { i * rank };
            let part = |t: &Tensor, dim, start, len| t.f_narrow(dim, start, len).map_err(|_| misshapen(dir, module));
            found.insert(Param::LoraA(*linear), part(&a, 0, start, rank)?);
            found.insert(Param::LoraB(*linear), part(&part(&b, 0, row, rows)?, 1, start, rank)?);
            row += rows;
        }
    }
    let checked = |spec: &super::ParamSpec| match found.remove(&spec.param) {
        Some(t) if t.size() == spec.shape => Ok(t),
        Some(t) => Err(Error::input(format!(
            "{}: {:?} has shape {:?}, expected {:?}",
            dir.display(),
            spec.param,
            t.size(),
            spec.shape
        ))),
        None => Err(missing(dir, &format!("{:?}", spec.param))),
    };
    specs.iter().map(checked).collect()
}

fn misshapen(dir: &Path, module: &Module) -> Error {
    Error::input(format!("{}: '{}' has adapters of another shape", dir.display(), module.name))
}

fn missing(dir: &Path, name: &str) -> Error {
    Error::input(format!("{}: '{name}' is missing", dir.join(WEIGHTS).display()))
}

/// Writes adapters into `dir`, replacing what was there. `base` is what they adapt, and `scalar_head` the parameters of the
/// head that was trained with them, where one was. They take their place if `lease` holds then.
///
/// # Errors
/// Names the path where storage failed, or the lease was lost.
pub fn write_adapters(
    dir: &Path,
    adapters: &Adapters,
    source: &Source,
    base: &str,
    scalar_head: Option<&[Tensor]>,
    lease: &Lease,
) -> Result<()> {
    let mut outgoing = scalar_head.map_or(Ok(vec![]), |values| trained_head(source, values))?;
    let saved: BTreeSet<String> =
        outgoing.iter().filter_map(|(name, _)| Some(name.rsplit_once('.')?.0.to_string())).collect();
    outgoing.iter_mut().for_each(|(name, _)| *name = format!("{PREFIX}{name}"));
    for block in 0..source.spec.layers {
        for module in Module::of_block(source.family, &source.spec, block) {
            outgoing.extend(factors(adapters, &source.spec, block, &module)?);
        }
    }
    let config = config(adapters, source, base, &saved);
    files::replace_dir(dir, lease, |temporary| {
        let weights = temporary.join(WEIGHTS);
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(outgoing, Some(metadata), &weights).map_err(|e| Error::storage(&weights, e))?;
        let config = serde_json::to_vec_pretty(&config).map_err(|e| Error::bug(e.to_string()))?;
        files::write(&temporary.join(CONFIG), &config)
    })
}

/// The tensors of a scalar head with these parameters, none of which is joined to another.
fn trained_head(source: &Source, values: &[Tensor]) -> Result<Vec<(String, Outgoing)>> {
    let params = source.spec.params(Segment::Head, HeadKind::Scalar);
    let value = |param: &Param| params.iter().position(|s| s.param == *param).and_then(|i| values.get(i));
    let stored = export::stored(source.family, &source.spec, Segment::Head, HeadKind::Scalar).into_iter();
    let named = stored.filter_map(|(entry, _)| Some((entry.name, value(entry.parts.first()?)?)));
    named.map(|(name, value)| Ok((name, Outgoing::new(value)?))).collect()
}

/// A and B of a module, where any of its linears is a target. Those that are not have zeros.
fn factors(adapters: &Adapters, spec: &ModelSpec, block: usize, module: &Module) -> Result<Vec<(String, Outgoing)>> {
    let all = spec.adapter_params(&Lora { targets: Linear::ALL.to_vec(), ..adapters.lora.clone() });
    let targets = spec.adapter_params(&adapters.lora);
    let value = |param: Param| -> Result<Tensor> {
        if let Some(i) = targets.iter().position(|s| s.param == param) {
            return Ok(adapters.blocks[block][i].shallow_clone());
        }
        let shape = all.iter().find(|s| s.param == param).map_or(&[][..], |s| &s.shape[..]);
        Ok(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?)
    };
    if !module.linears.iter().any(|l| adapters.lora.targets.contains(l)) {
        return Ok(vec![]);
    }
    let of = |factor: fn(Linear) -> Param| module.linears.iter().map(|l| value(factor(*l))).collect::<Result<Vec<_>>>();
    let (a, b) = (of(Param::LoraA)?, of(Param::LoraB)?);
    let (a, b) = (Tensor::f_cat(&a, 0)?, Tensor::f_block_diag(&b)?);
    let b = if module.layout == Layout::Heads {
        let parts = b.f_chunk(module.linears.len() as i64, 0)?;
        Tensor::f_cat(&dealt(&parts.iter().collect::<Vec<_>>(), spec.heads)?, 0)?
    } else {
        b
    };
    Ok(vec![(module.key('A'), Outgoing::new(&a)?), (module.key('B'), Outgoing::new(&b)?)])
}

/// What PEFT reads to put the adapters onto their base.
fn config(adapters: &Adapters, source: &Source, base: &str, modules_to_save: &BTreeSet<String>) -> Value {
    let lora = &adapters.lora;
    let modules = Module::of_block(source.family, &source.spec, 0);
    let adapted: Vec<&Module> = modules.iter().filter(|m| m.linears.iter().any(|l| lora.targets.contains(l))).collect();
    let pattern = |of: &dyn Fn(f64) -> Value| -> Map<String, Value> {
        let joined = adapted.iter().filter(|m| m.linears.len() > 1);
        joined.map(|m| (m.kind(0).to_string(), of(m.linears.len() as f64))).collect()
    };
    json!({
        "peft_type": "LORA",
        "task_type": if modules_to_save.is_empty() { "CAUSAL_LM" } else { "SEQ_CLS" },
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": lora.rank,
        "lora_alpha": lora.alpha(),
        "lora_dropout": lora.dropout,
        "target_modules": adapted.iter().map(|m| m.kind(0)).collect::<Vec<_>>(),
        "rank_pattern": pattern(&|n| json!(n as u32 * lora.rank)),
        "alpha_pattern": pattern(&|n| json!(n * lora.alpha())),
        "fan_in_fan_out": adapted.iter().any(|m| m.layout == Layout::Transposed),
        "modules_to_save": (!modules_to_save.is_empty()).then_some(modules_to_save),
        "bias": "none",
        "use_rslora": false,
        "use_dora": false,
    })
}
