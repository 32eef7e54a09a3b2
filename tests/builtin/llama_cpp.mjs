// Runs a GGUF file in llama.cpp: node llama_cpp.mjs FOLDER-OF-NODE-LLAMA-CPP FILE < JSON > JSON
// In: {"tokens": [...], "texts": ["...", ...], "generate": n, "exact": bool}; "exact" keeps the cache in float32.
// Out: logits behind every token, what follows, the texts' tokens, and the texts made of them again.
import {readFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [folder, file] = process.argv.slice(2);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(join(folder, "dist", "index.js")).href);
const {tokens, texts, generate, exact} = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false});
const model = await llama.loadModel({modelPath: file, gpuLayers: 0});
const wide = {flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({contextSize: 512, threads: 2, ...(exact ? wide : {})});
const sequence = context.getSequence();
const outputs = await sequence.controlledEvaluate(
    tokens.map((token) => [token, {generateNext: {logits: true, options: {temperature: 0}}}])
);
const logits = tokens.map((_, index) => {
    const row = new Array(model.fileInfo.metadata[model.fileInfo.metadata.general.architecture].vocab_size);
    for (const [token, value] of outputs[index].next.logits) row[token] = value;
    return row;
});
await sequence.clearHistory();
const followed = [];
if (generate > 0)
    for await (const token of sequence.evaluate(tokens, {temperature: 0})) {
        followed.push(token);
        if (followed.length >= generate) break;
    }
const tokenized = texts.map((text) => model.tokenize(text));
const restored = tokenized.map((found) => model.detokenize(found));
console.log(JSON.stringify({logits, followed, tokenized, restored}));
await llama.dispose();
