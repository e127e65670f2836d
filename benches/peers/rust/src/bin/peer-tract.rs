//! Runs one ONNX graph with tract.

use anyhow::Result;
use latile_peers::{Input, arguments, serve};
use tract_onnx::prelude::*;

fn main() -> Result<()> {
    let args = arguments()?;
    if args.threads > 1 {
        multithread::set_default_executor(multithread::Executor::multithread(args.threads));
    }
    let mut model = tract_onnx::onnx().model_for_path(&args.model)?;
    let mut feed: TVec<TValue> = tvec!();
    for (index, input) in args.inputs.into_iter().enumerate() {
        let tensor = match input {
            Input::Float(shape, data) => Tensor::from_shape(&shape, &data)?,
            Input::Int(shape, data) => Tensor::from_shape(&shape, &data)?,
        };
        model = model
            .with_input_fact(index, InferenceFact::dt_shape(tensor.datum_type(), tensor.shape()))?;
        feed.push(tensor.into_tvalue());
    }
    let plan = model.into_optimized()?.into_runnable()?;
    serve(|| {
        let output = plan.run(feed.clone())?.remove(0).into_tensor();
        Ok(output.to_plain_array_view::<f32>()?.iter().copied().collect())
    })
}
